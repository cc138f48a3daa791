"""Runs and stores on a hub that is a server on loopback: published, loaded again, refused."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common import hub as address
from evaluate.push import write
from evaluate.run import evaluate
from tests.evaluate.runs import arguments, make_run, settings_of
from tests.hub import TOKEN, Hub, Run
from transcoder import Transcoder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluated run that knows its training."""
    folder = tmp_path_factory.mktemp("push")
    make_run(folder)
    run_dir = settings_of(folder).run_dir()
    own = Transcoder.load(run_dir)
    training = {"training": {"rows": 4096, "steps": 64, "l0": [1.0, 2.0, 3.0]}, "git_commit": None}
    replace(own, metadata=own.metadata | training).save(run_dir)
    evaluate(settings_of(folder), ce_tokens=0)
    return folder


LOAD = """
import sys
from transcoder import Transcoder
found = Transcoder.load(sys.argv[1])
found.save(sys.argv[2])
"""


def test_a_run_is_published_with_its_card_and_loaded_again(
    root: Path, hub: Hub, at_hub: Run, tmp_path: Path
) -> None:
    process = at_hub("-m", "evaluate.push", "--repo", "me/transcoders/layer_0", *arguments(root))
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == "hf://me/transcoders/layer_0"
    files = hub.repos["models/me/transcoders"]
    assert sorted(files) == [
        f"layer_0/{name}" for name in ("README.md", "settings.json", "transcoder.safetensors")
    ]
    assert hub.commits["models/me/transcoders"] == ["Transcoder tiny, layer 0"]
    process = at_hub("-c", LOAD, "hf://me/transcoders/layer_0", str(tmp_path / "again"))
    assert process.returncode == 0, process.stderr
    own, again = Transcoder.load(settings_of(root).run_dir()), Transcoder.load(tmp_path / "again")
    for name, tensor in own.parameters.named().items():
        assert torch.equal(again.parameters.named()[name], tensor)
    assert torch.equal(again.thresholds, own.thresholds)
    assert again.metadata["source"] == own.metadata["source"]


PUSH = """
import sys
from pathlib import Path
from evaluate.push import push
from transcoder import weights
weights.MAX_FILE = 1000
push(Path(sys.argv[1]), sys.argv[2])
"""


@pytest.mark.parametrize("name", ["", "/transcoder.safetensors"])
def test_a_run_in_several_files(root: Path, hub: Hub, at_hub: Run, tmp_path: Path, name: str) -> None:
    """Published and loaded with all of them; another tool's shards in the folder stay there."""
    process = at_hub("-c", PUSH, str(settings_of(root).run_dir()), "hf://me/large/layer_0")
    assert process.returncode == 0, process.stderr
    files = hub.repos["models/me/large"]
    parts = [f"transcoder-0000{i}-of-00002.safetensors" for i in (1, 2)]
    made = (
        "README.md",
        "settings.json",
        *parts,
        "transcoder.safetensors",
        "transcoder.safetensors.index.json",
    )
    assert sorted(files) == [f"layer_0/{each}" for each in made]
    files["layer_0/model-00001-of-00002.safetensors"] = b"another tool's"
    process = at_hub("-c", LOAD, f"hf://me/large/layer_0{name}", str(tmp_path / "again"))
    assert process.returncode == 0, process.stderr
    own, again = Transcoder.load(settings_of(root).run_dir()), Transcoder.load(tmp_path / "again")
    assert all(torch.equal(again.saved()[0][key], each) for key, each in own.saved()[0].items())
    assert not [*(tmp_path / "hf").rglob("model-*")]


def test_the_card_says_what_was_measured_and_how_to_load_it(root: Path, hub: Hub, at_hub: Run) -> None:
    assert at_hub("-m", "evaluate.push", "--repo", "me/one", *arguments(root)).returncode == 0
    card = hub.repos["models/me/one"]["README.md"].decode()
    metrics = json.loads((settings_of(root).run_dir() / "evaluation" / "metrics.json").read_text())
    header, text = card.removeprefix("---\n").split("---\n", 1)
    assert "base_model: tests/tiny" in header
    assert 'Transcoder.load("hf://me/one")' in text
    assert f"| 2 | 24 | {metrics['prefixes'][2]['fvu']:.3g} |" in text
    assert "1,500 held-out rows" in text
    assert "without the norm's gain" in " ".join(text.split())
    assert "{{" not in card
    assert "{%" not in card
    assert "\n\n\n" not in card


def test_neither_the_token_nor_a_local_path_is_written_anywhere(
    root: Path, hub: Hub, at_hub: Run, tmp_path: Path
) -> None:
    process = at_hub("-m", "evaluate.push", "--repo", "me/one", *arguments(root))
    assert process.returncode == 0, process.stderr
    assert at_hub("-c", LOAD, "hf://me/one", str(tmp_path / "again")).returncode == 0
    assert f"Bearer {TOKEN}" in hub.tokens
    published = [data for files in hub.repos.values() for data in files.values()]
    local = [path.read_bytes() for folder in (root, tmp_path) for path in folder.rglob("*") if path.is_file()]
    assert len(local) > 10
    assert not any(
        TOKEN.encode() in data
        for data in [*published, *local, process.stdout.encode(), process.stderr.encode()]
    )
    assert not any(str(root).encode() in data for data in published)


def test_no_byte_of_what_is_published_names_a_path(tmp_path: Path) -> None:
    """Model, text, first weights and cache below directories whose names are nobody's business."""
    secret, folder = tmp_path / "secret", tmp_path / "published"
    make_run(secret)
    run_dir = settings_of(secret).run_dir()
    own = Transcoder.load(run_dir)
    source = own.metadata["source"] | {"model": f"{secret}/llama/", "dataset": "files"}
    source["files"] = {"secret/patients.jsonl": "0" * 64}
    settings = own.metadata["settings"]
    settings["model"]["name"], settings["data"]["files"] = f"{secret}/llama", [f"{secret}/patients.jsonl"]
    settings["train"]["init_from"], settings["paths"]["cache"] = f"{secret}/first", f"{secret}/cache"
    training = {"training": {"rows": 4096, "steps": 64, "l0": [1.0, 2.0, 3.0]}, "git_commit": None}
    replace(own, metadata=own.metadata | training | {"source": source, "settings": settings}).save(run_dir)
    store = settings_of(secret).store_path(0)
    metrics, _ = evaluate(settings_of(secret), ce_tokens=0)
    named = {"model": source["model"], "dataset": "secret/patients.jsonl"}
    metrics = metrics.model_copy(update={"provenance": metrics.provenance.model_copy(update=named)})
    (run_dir / "evaluation" / "metrics.json").write_text(json.dumps(metrics.written()))
    folder.mkdir()
    assert write(run_dir, folder, "hf://me/one") == "Transcoder tiny, layer 0"
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(files) == ["README.md", "settings.json", "transcoder.safetensors"]
    for data in files.values():
        for word in (str(tmp_path), tmp_path.name, "secret", store):
            assert word.encode() not in data
    card = files["README.md"].decode()
    assert "# Transcoder of layer 0 of llama\n" in card
    assert "base_model" not in card
    assert "| text | `patients.jsonl` |" in card
    write(run_dir, folder, "hf://me/one", "me/llama")
    card = (folder / "README.md").read_text()
    assert "base_model: me/llama" in card
    assert json.loads((folder / "settings.json").read_text())["model"]["name"] == "me/llama"


def one_line(process: subprocess.CompletedProcess[str]) -> str:
    assert (process.returncode, process.stderr.count("\n")) == (2, 1), process.stderr
    return process.stderr


def test_what_the_hub_refuses_is_one_line(root: Path, hub: Hub, at_hub: Run) -> None:
    line = one_line(at_hub("-m", "evaluate.push", "--repo", "me/one", *arguments(root), token=None))
    assert "hf://me/one" in line
    assert hub.repos == {}
    load = ("-m", "transcoder.import_", *arguments(root, "--run", "other"), "--from")
    assert "no such repository, or no access" in one_line(at_hub(*load, "hf://me/absent"))
    hub.repos["models/me/one"] = {"notes.txt": b"nothing"}
    assert "nothing there; expected a file, or a directory with" in one_line(
        at_hub(*load, "hf://me/one/layer_0")
    )
    assert "nothing there" in one_line(at_hub(*load, "hf://me/one"))
    assert "expected hf://owner/name" in one_line(at_hub(*load, "hf://me"))
    assert "expected hf://owner/name" in one_line(
        at_hub("-m", "evaluate.push", "--repo", "me/one/../x", *arguments(root))
    )


def test_a_hub_that_is_not_there_is_one_line(root: Path, at_hub: Run, hub: Hub) -> None:
    hub.shutdown()
    hub.server_close()
    line = one_line(at_hub("-m", "evaluate.push", "--repo", "me/one", *arguments(root)))
    assert "the Hugging Face hub did not do it" in line


def test_only_what_was_trained_and_evaluated_is_published(root: Path, hub: Hub, at_hub: Run) -> None:
    settings = settings_of(root, "--run", "bare")
    own = Transcoder.load(settings_of(root).run_dir())
    replace(own, metadata={"source": own.metadata["source"]}).save(settings.run_dir())
    command = ("-m", "evaluate.push", "--repo", "me/one", *arguments(root), "--run", "bare")
    assert "was imported, not trained here; push the original" in one_line(at_hub(*command))
    own.save(settings.run_dir())
    assert "evaluate it (make evaluate)" in one_line(at_hub(*command))
    assert hub.repos == {}


def test_a_store_goes_to_the_hub_and_is_read_from_there(root: Path, hub: Hub, at_hub: Run) -> None:
    to = "hf://datasets/me/activations"
    process = at_hub("-m", "shards", "upload", "--to", to, *arguments(root))
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[1] == "its manifest is there too, and says: tests/tiny"
    names = hub.repos["datasets/me/activations"]
    assert "tiny/layer_0.zarr/files.sha256" in names
    assert not any(".tmp" in name or ".harvest" in name for name in names)
    assert len(hub.commits["datasets/me/activations"]) == 1
    remote = arguments(root)
    remote[remote.index("--paths.activations") + 1] = to
    process = at_hub("-m", "shards", "verify", *remote)
    assert process.returncode == 0, process.stderr
    assert "every byte is as it was committed" in process.stdout
    process = at_hub("-m", "shards", "info", *remote)  # now that its files are links to the cache's blobs
    assert process.returncode == 0, process.stderr
    del names["tiny/layer_0.zarr/files.sha256"]
    hub.commits["datasets/me/activations"].append("one file removed")
    assert "files.sha256: not in the repository" in one_line(at_hub("-m", "shards", "verify", *remote))


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("hf://me/name", ("model", "me/name", None, "")),
        ("hf://me/name/a/b.npz", ("model", "me/name", None, "a/b.npz")),
        ("hf://me/name@v1.0/a", ("model", "me/name", "v1.0", "a")),
        ("hf://datasets/me/name@main/layer_0.zarr/", ("dataset", "me/name", "main", "layer_0.zarr")),
    ],
)
def test_addresses(url: str, expected: tuple) -> None:
    assert address.parse(url) == expected

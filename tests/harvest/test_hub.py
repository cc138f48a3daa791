"""A model and a text of the hub, by their names, from a server on loopback (tests/hub.py)."""

import json
from pathlib import Path

import pytest
import torch

from shards import Store
from tests.hub import Hub, Run
from tests.models import sentences

ROWS = ("--harvest.rows", "2000", "--harvest.context_length", "32", "--harvest.heldout_fraction", "0.1")


@pytest.fixture
def filled(hub: Hub, llama: Path) -> Hub:
    """Where the real one has google/gemma-2-2b and fineweb-edu: a tiny model, and text in two files."""
    hub.repos["models/me/tiny-llama"] = {path.name: path.read_bytes() for path in llama.iterdir()}
    lines = [json.dumps({"text": text, "url": "x"}).encode() + b"\n" for text in sentences(600)]
    parts = {f"data/train-0000{i}-of-00002.jsonl": b"".join(lines[300 * i :][:300]) for i in range(2)}
    hub.repos["datasets/me/text"] = {"README.md": b"---\nlicense: mit\n---\n", **parts}
    return hub


def arguments(tmp_path: Path, **changed: str) -> list[str]:
    options = {"model.name": "me/tiny-llama", "data.dataset": "me/text", "data.name": "none"}
    options |= {"paths.activations": str(tmp_path / "hub")} | changed
    return ["--layer", "1", *ROWS, *(word for key, value in options.items() for word in (f"--{key}", value))]


@pytest.mark.slow
def test_the_same_store_as_from_the_same_files(
    filled: Hub, llama: Path, corpus: Path, at_hub: Run, tmp_path: Path
) -> None:
    process = at_hub("-m", "harvest", *arguments(tmp_path))
    assert process.returncode == 0, process.stderr
    local = {
        "model.name": str(llama),
        "data.files": str(corpus),
        "paths.activations": str(tmp_path / "local"),
    }
    process = at_hub("-m", "harvest", *arguments(tmp_path, **local))
    assert process.returncode == 0, process.stderr
    hub, files = (Store.open(tmp_path / name / "tiny-llama/layer_1.zarr") for name in ("hub", "local"))
    assert (hub.manifest.source.model, hub.manifest.source.dataset) == ("me/tiny-llama", "me/text")
    assert hub.manifest.source.weights_sha256 == files.manifest.source.weights_sha256
    for mine, theirs in ((hub.train, files.train), (hub.heldout, files.heldout)):
        assert all(map(torch.equal, mine.rows(0, len(mine)), theirs.rows(0, len(theirs))))


REFUSED = [
    (
        {"model.name": "me/gated"},
        "model me/gated: access is gated; accept its licence on the hub and set HF_TOKEN",
    ),
    ({"model.name": "me/absent"}, "model me/absent: not found on the Hugging Face hub ("),
    (
        {"model.name": "me/notes"},
        "model me/notes: has no config.json on the hub; expected a Hugging Face model",
    ),
    (
        {"data.dataset": "me/absent"},
        "data.dataset me/absent: cannot be read: Dataset 'me/absent' doesn't exist",
    ),
    ({"data.split": "test"}, "data.dataset me/text: cannot be read: Bad split: test. Available splits: ["),
    ({"data.name": "sample-10BT"}, "(data.name is 'sample-10BT'; give --data.name)"),
    (
        {"data.text_column": "body"},
        "data.dataset me/text: no column 'body'; expected data.text_column among ",
    ),
]
EACH = """
import json, sys
from harvest.__main__ import main
from common.cli import run_stage
for words in json.loads(sys.argv.pop()):
    sys.argv[1:] = words
    try:
        run_stage(main)
    except SystemExit as end:
        print(end.code)
"""


def test_what_the_hub_does_not_have_is_one_line(filled: Hub, at_hub: Run, tmp_path: Path) -> None:
    """The plan of a gated model, which reads no more than its configuration, too."""
    filled.repos["models/me/gated"] = filled.repos["models/me/tiny-llama"]
    filled.repos["models/me/notes"] = {"README.md": b"nothing else"}
    filled.gated.add("models/me/gated")
    commands = [arguments(tmp_path, **changed) for changed, _ in REFUSED]
    process = at_hub("-c", EACH, json.dumps([["--plan", *commands[0]], *commands]))
    assert process.stdout.split() == ["2"] * 8, process.stderr
    errors = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    for error, expected in zip(errors, [REFUSED[0][1], *(line for _, line in REFUSED)], strict=True):
        assert expected in error
    assert "Traceback" not in process.stderr
    assert not list((tmp_path / "hub").rglob("*.zarr"))

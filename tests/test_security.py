"""Nothing that is read can run code, leave its directory or become markup; no secret is written or printed."""

import ast
import hashlib
import json
import re
import shutil
import tomllib
from importlib.metadata import metadata
from pathlib import Path

import numpy as np
import pytest
from zarr import create_array

from common import hub
from common.cli import load, parser
from common.errors import InputError
from common.files import inside
from common.settings import ROOT
from docs import licences
from shards import Store, remote
from shards.commit import commit_text, read_commit
from shards.reader import open_array
from shards.remote import LocalFiles
from shards.verify import verify
from tests.evaluate.fakes import random_coder
from tests.fixtures import make_store
from train import record
from transcoder import export
from transcoder.formats import gemma_scope

# -- code that runs what it reads ----------------------------------------------------------------------

MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
CALLS = {
    "torch.load", "torch.save", "eval", "exec", "builtins.eval", "builtins.exec", "__import__", "os.system",
    "os.popen", "yaml.load", "yaml.full_load", "yaml.unsafe_load", "pandas.read_pickle", "subprocess.getoutput",
    "subprocess.getstatusoutput", "shutil.unpack_archive", "tempfile.mktemp",
}  # fmt: skip
KEYWORDS = {"allow_pickle": False, "shell": False, "trust_remote_code": False, "weights_only": True}
"""Arguments that may only be given with this value."""


def hazards(source: str) -> list[str]:
    """What `source` imports or calls that could run what it reads, under whatever name it was imported."""
    tree, names, names_of_hazards = ast.parse(source), dict[str, str](), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names_of_hazards += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
            names |= {alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names_of_hazards += [node.module] if node.module and node.module.split(".")[0] in MODULES else []
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = _dotted(node.func, names)
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        first = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
        if called in CALLS or (called == "numpy.load" and "allow_pickle" not in keywords):
            names_of_hazards.append(called)
        if called == "importlib.import_module" and str(first).split(".")[0] in MODULES:
            names_of_hazards.append(str(first))
        # Without the argument transformers asks on the terminal, and `yes |` answers.
        if (
            isinstance(node.func, ast.Attribute)
            and _loads(node.func, names)
            and "trust_remote_code" not in keywords
        ):
            names_of_hazards.append(called)
        for name, value in keywords.items():
            if name in KEYWORDS and not (isinstance(value, ast.Constant) and value.value is KEYWORDS[name]):
                names_of_hazards.append(f"{name}={ast.unparse(value)}")
    return names_of_hazards


def _loads(function: ast.Attribute, names: dict[str, str]) -> bool:
    """Whether this loads what a model's directory or the hub says: AutoX.from_pretrained and TransformerBridge's."""
    owner = _dotted(function.value, names).rpartition(".")[2]
    loads = owner.startswith("Auto") and function.attr in ("from_pretrained", "from_config")
    return loads or function.attr == "boot_transformers"


def _dotted(node: ast.expr, names: dict[str, str]) -> str:
    """The full name of what is called: np.lib.load -> numpy.lib.load."""
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, names)}.{node.attr}"
    return names.get(node.id, node.id) if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize(
    "bad",
    [
        *(f"import {module}" for module in sorted(MODULES)),
        "from pickle import loads",
        "def f():\n    import joblib.numpy_pickle",
        "import importlib\nimportlib.import_module('dill')",
        "import torch\ntorch.load(path)",
        "from torch import load as read\nread(path)",
        "import torch as t\nt.load(path, weights_only=True)",
        "import numpy as np\nnp.load(path)",
        "import numpy\nnumpy.load(path, allow_pickle=flag)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "from numpy import load\nload(path, mmap_mode='r')",
        "eval('1')",
        "exec('a = 1')",
        "__import__('os')",
        "import builtins\nbuiltins.eval('1')",
        "import yaml\nyaml.load(text)",
        "from yaml import load\nload(text, Loader=loader)",
        "import os\nos.system('ls')",
        "from os import system as s\ns('ls')",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "from subprocess import Popen\nPopen('ls', shell=bool(1))",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "from transformers import AutoConfig\nAutoConfig.from_pretrained(name)",
        "import transformers\ntransformers.AutoTokenizer.from_pretrained(name, revision=revision)",
        "TransformerBridge.boot_transformers(name, hf_model=model)",
        "import shutil\nshutil.unpack_archive(path)",
    ],
)
def test_the_detector_finds(bad: str) -> None:
    assert hazards(bad)


def test_the_detector_lets_pass_what_is_safe() -> None:
    fine = "import json, re, subprocess\nimport numpy as np\nnp.load(p, allow_pickle=False)\nmodel.eval()\n"
    fine += "json.loads(t)\nre.compile(t)\nsubprocess.run(['ls'], shell=False)\n"
    assert hazards(fine) == []


def test_nothing_of_ours_runs_what_it_reads() -> None:
    folders = ("common", "harvest", "shards", "transcoder", "train", "evaluate", "bench", "docs")
    files = [path for name in folders for path in (ROOT / name).rglob("*.py")]
    assert len(files) > 60
    hazards_of = {str(path): hazards(path.read_text()) for path in files}
    assert {path: names for path, names in hazards_of.items() if names} == {}


# -- what a store's bytes may start --------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Store:
    rng = np.random.default_rng(0)
    rows = tuple(rng.standard_normal((1500, 4)).astype(np.float32) for _ in range(2))
    return make_store(
        tmp_path_factory.mktemp("security") / "layer_0.zarr", (rows[0], rows[1]), (rows[1], rows[0])
    )


@pytest.fixture
def store(whole: Store, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(whole.path, tmp_path / "layer_0.zarr")


def codecs_with(name: str) -> list[dict]:
    inner = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": name, "configuration": {}}]
    sharding = {"chunk_shape": [1024, 4], "codecs": inner, "index_codecs": [], "index_location": "end"}
    return [{"name": "sharding_indexed", "configuration": sharding}]


@pytest.mark.parametrize(
    "name", ["numcodecs.pickle", "numcodecs.json2", "vlen-utf8", "numcodecs.delta", "pickle"]
)
def test_a_codec_that_is_not_of_zarrs_core_is_never_run(whole: Store, store: Path, name: str) -> None:
    array = whole.train.readers["inputs"].array
    path = store / array.path / "zarr.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"codecs": codecs_with(name)}))
    with pytest.raises(InputError, match=f"codec {name}: expected those of zarr's core"):
        open_array(LocalFiles(store), array)


def test_objects_are_not_rows(whole: Store, store: Path) -> None:
    """Strings in the place of numbers; and zarr 2's metadata, whose filters can unpickle, is not looked at."""
    array = whole.train.readers["inputs"].array
    kept = (store / array.path / "zarr.json").read_bytes()
    shutil.rmtree(store / array.path)
    create_array(store / array.path, shape=array.shape, dtype="str", chunks=array.chunk)
    with pytest.raises(InputError, match="data_type: expected float32, found string"):
        open_array(LocalFiles(store), array)
    (store / array.path / "zarr.json").unlink()
    old = {"zarr_format": 2, "shape": list(array.shape), "chunks": list(array.chunk), "dtype": "|O"}
    old |= {"filters": [{"id": "pickle"}], "compressor": None, "fill_value": None, "order": "C"}
    (store / array.path / ".zarray").write_text(json.dumps(old))
    with pytest.raises(InputError, match="cannot be read"):
        open_array(LocalFiles(store), array)
    (store / array.path / "zarr.json").write_bytes(kept.replace(b'"end"', b'"start"'))
    with pytest.warns(UserWarning, match="read through zarr-python"):
        reader = open_array(LocalFiles(store), array)
    assert reader._zarr.metadata.zarr_format == 3  # type: ignore[attr-defined]


# -- paths that leave their directory ------------------------------------------------------------------

OUTSIDE = [
    "../x", "..", ".", "", "/", "/etc/passwd", "//x", "a/../../x", "a/..", "a/./b", "a//b", "a/", "a\\b", "..\\x",
    "C:\\x", "a\0b", "a\nb", "a\x7fb", "\x1b[2J",
]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_leaves_its_directory(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not the name of a file in it") as stopped:
        inside(tmp_path, name)
    assert "\n" not in str(stopped.value)


@pytest.mark.parametrize("name", ["a", "train/inputs/c/0/0", ".DS_Store", "a..b", "a b (1).json", "é"])
def test_a_name_that_stays(name: str, tmp_path: Path) -> None:
    assert inside(tmp_path, name) == tmp_path / name


def with_name(root: Path, name: str, content: bytes = b"{}") -> None:
    """Commit `root` anew with one more file, `name`, in its list."""
    digests = read_commit(root) | {name: hashlib.sha256(content).hexdigest()}
    (root / "files.sha256").write_bytes(commit_text(digests))


@pytest.mark.parametrize("name", [name for name in OUTSIDE if "\n" not in name and name])
def test_a_commit_that_lists_a_file_elsewhere(store: Path, name: str) -> None:
    with_name(store, name)
    for use in (
        Store.open,
        lambda path: verify(LocalFiles(path)),
        lambda path: remote.upload(path, "s3://b/x"),
    ):
        with pytest.raises(InputError, match="is not the name of a file in it"):
            use(store)


@pytest.mark.parametrize("lines", [b"no digest\n", b"\xff\xfe  a\n", b"\n", b"0  zarr.json\n"])
def test_a_commit_that_is_no_list(store: Path, lines: bytes) -> None:
    end = f"# {hashlib.sha256(lines).hexdigest()}\n".encode()
    (store / "files.sha256").write_bytes(lines + end)
    with pytest.raises(InputError, match="expected lines of <sha256>  <path>"):
        Store.open(store)


def test_a_remote_store_writes_below_its_cache_only(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other side says which files there are; what it serves for ../../x.json must land nowhere."""
    with_name(store, "../../x.json")
    monkeypatch.setattr(
        remote.Client, "get", lambda _, name: (store / name).read_bytes() if name[0] != "." else b"{}"
    )
    monkeypatch.setattr(remote.Client, "mark", lambda *_: ("tag", 1, "date"))
    cache = tmp_path / "a" / "b" / "cache"
    with pytest.raises(InputError, match="is not the name of a file in it"):
        Store.open("s3://elsewhere/layer_0.zarr", cache)
    files = remote.files_of("s3://elsewhere/layer_0.zarr", cache, 10**9)
    with pytest.raises(InputError, match="is not the name of a file in it"):
        files.local("../../x.json")
    assert [path.name for path in (tmp_path / "a").rglob("*") if path.is_file()] == ["files.sha256"]


@pytest.mark.parametrize("name", ["tokenizer.json", "train/inputs/c/0/0", "train/inputs"])
def test_links_out_of_a_store(store: Path, tmp_path: Path, name: str) -> None:
    """Neither read nor, above all, uploaded; a link to a store, or within it, is fine."""
    (store / name).rename(tmp_path / "elsewhere")
    (store / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(
        InputError, match=r"a link that leads out of .*copy it with links followed \(cp -rL\)"
    ):
        Store.open(store).train.rows(0, 1500)
    with pytest.raises(InputError, match="a link that leads out of"):
        remote.upload(store, "hf://datasets/me/activations")
    (store / name).unlink()
    (tmp_path / "elsewhere").rename(store / "kept")
    (store / name).symlink_to(store / "kept")
    (tmp_path / "link.zarr").symlink_to(store)
    assert len(Store.open(tmp_path / "link.zarr").train.rows(0, 1500)[0]) == 1500


@pytest.mark.parametrize(
    "text", ["../step_5", "/etc", "step_5/../../x", "step_", "", "step_5\0", "\xff", "a\\b"]
)
def test_a_checkpoints_pointer_stays_in_its_run(text: str, tmp_path: Path) -> None:
    (tmp_path / "state" / "step_5").mkdir(parents=True)
    (tmp_path / "state" / "latest").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"expected step_N, found .* to train again from the start"):
        record.latest(tmp_path)
    (tmp_path / "state" / "latest").write_text("step_5\n")
    assert record.latest(tmp_path) == tmp_path / "state" / "step_5"
    (tmp_path / "state" / "step_5").rename(tmp_path / "elsewhere")
    (tmp_path / "state" / "step_5").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="a link that leads out of"):
        record.latest(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        ("--run", "../x"),
        ("--run", "/tmp/x"),
        ("--run", "a\\b"),
        ("--run", ".."),
        ("--harvest", "../x"),
        ("--model.name", ".."),
        ("--model.name", "a/.."),
        ("--model.name", "/"),
        ("--model.name", "."),
        ("--model.name", "a/b\\c"),
        ("--model.name", "a/b\0c"),
        ("--layer", "../3"),
    ],
)
def test_settings_that_would_leave_the_data_directories(options: tuple[str, ...], tmp_path: Path) -> None:
    def places() -> object:
        settings = load(parser("train", ""), ["--layer", "3", "--model.name", "m", *options])[0]
        return settings.store_path(3), settings.run_dir()

    with pytest.raises(InputError) as stopped:
        places()
    assert "\n" not in str(stopped.value)


@pytest.mark.parametrize(
    "url",
    [
        "hf://a/b/../c",
        "hf://a/b@../c",
        "hf://../b",
        "hf://a/..",
        "hf://a/b/c\\d",
        "hf://a/b/c\0",
    ],
)
def test_hub_addresses_that_leave_the_repository(url: str) -> None:
    with pytest.raises(InputError, match="expected hf://"):
        hub.parse(url)


def test_metadata_of_a_foreign_run_names_no_place(tmp_path: Path) -> None:
    """The layer becomes part of a path when a run is exported."""
    coder = random_coder(4, 4, (8,))
    for layer in ("/../../../x", None, 1.5, True):
        coder.metadata["source"]["layer"] = layer
        coder.save(tmp_path / "run")
        with pytest.raises(InputError, match=r"source\.layer: expected a number, found"):
            export.export(tmp_path / "run", "gemma_scope")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["run", "transcoder.safetensors"]


def test_an_archive_gives_its_known_plain_arrays_only(tmp_path: Path) -> None:
    arrays = {"W_enc": np.ones((4, 8)), "b_enc": np.ones(8), "W_dec": np.ones((8, 4)), "b_dec": np.ones(4)}
    np.savez(tmp_path / "params.npz", threshold=np.ones(8), **arrays, **{"../../x": np.array([{}], object)})
    assert set(gemma_scope.read(tmp_path / "params.npz")[0]) == {*arrays, "thresholds"}
    np.savez(tmp_path / "params.npz", threshold=np.array([{}] * 8, object), **arrays)
    with pytest.raises(InputError, match=r"not a readable \.npz of plain arrays"):
        gemma_scope.read(tmp_path / "params.npz")
    assert [path.name for path in tmp_path.rglob("*")] == ["params.npz"]


# -- licences ------------------------------------------------------------------------------------------


def test_every_dependency_is_listed_with_its_licence() -> None:
    lines = licences.page().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")][1:]
    listed = {re.sub(r"[-_.]+", "-", name).lower(): licence for name, _, licence in rows}
    installed = {name: version.partition("+")[0] for name, version, _ in rows}  # 2.13.0+cpu
    assert installed == licences.pinned(), "constraints.txt and what is installed differ"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    run = {re.split(r"[<>=\[]", each)[0].replace("_", "-").lower() for each in project["dependencies"]}
    assert len(run) > 15
    assert run <= set(listed)
    assert all(listed.values())
    assert not [name for name, licence in listed.items() if re.search(r"\bA?GPL", licence)]


def test_a_licence_is_what_the_package_says() -> None:
    """Of each kind of statement one: expression, classifier, free text."""
    said = {name: licences.licence(metadata(name)) for name in ("numpy", "safetensors", "google-crc32c")}
    assert said["numpy"].startswith("BSD-3-Clause AND")
    assert said["safetensors"] == "Apache Software License"
    assert said["google-crc32c"].startswith("Apache")

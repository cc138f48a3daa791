"""docs/other_tools.md, word by word: its commands by make, its Python where its imports live."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.cli import load, parser
from common.settings import ROOT, Settings
from evaluate.run import evaluate
from tests.evaluate.fakes import random_coder, random_rows
from tests.fixtures import make_store
from tests.hub import TOKEN, running
from transcoder.formats import gemma_scope

pytestmark = pytest.mark.peers
D, LAYERS, ENDS = 576, range(30), (16, 64)
GEMMA_SCOPE = "google/gemma-scope-2b-pt-transcoders"
OTHERS = ("sae_lens", "circuit_tracer", "delphi")


def snippets() -> list[tuple[str, str]]:
    """(language, text) of the page's blocks; commands have no language."""
    page = (ROOT / "docs/other_tools.md").read_text()
    return re.findall(r"^```(\w*)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)


def settings_in(folder: Path, layer: int) -> Settings:
    argv = ["--profile", "demo", "--layer", str(layer), "--run", "demo"]
    paths = [
        "--paths.activations",
        str(folder / "activations"),
        "--paths.checkpoints",
        str(folder / "checkpoints"),
    ]
    return load(parser("tests", ""), argv + paths)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the page's reader has: a store of layer 12, and an evaluated run of it; runs of the other layers too."""
    root = tmp_path_factory.mktemp("readme")
    rows = tuple(values.numpy() for values in vars(random_rows(1100, D, D)).values())
    hooks = {"input_hook": "blocks.12.ln2.hook_normalized", "output_hook": "blocks.12.hook_mlp_out"}
    where = settings_in(root, 12).store_path(12)
    known: dict[str, Any] = {
        "model": "embedded/smollm2-135m",
        "layer": 12,
        "n_layers": 30,
        "context_length": 32,
        **hooks,
    }
    store = make_store(where, rows, rows, **known)
    source = store.manifest.source.model_dump(mode="json")
    for layer in LAYERS:
        named = {key: value.replace("12", str(layer)) for key, value in hooks.items()} | {"layer": layer}
        settings = settings_in(root, layer)
        metadata = {
            "settings": settings.model_dump(mode="json"),
            "source": source | named,
            "harvest_fingerprint": store.manifest.fingerprint,
            "training": {"rows": 1024, "steps": 1, "l0": [3.0, 5.0]},
            "heldout": {"l0": [3.0, 5.0]},
            "git_commit": None,
        }
        replace(random_coder(D, D, ENDS, seed=layer), metadata=metadata).save(settings.run_dir())
    evaluate(settings_in(root, 12), ce_tokens=0)
    return root


@pytest.fixture(scope="module")
def surroundings(folder: Path) -> Iterator[dict[str, str]]:
    """Environment of the commands: this Python's make variables, and a hub that has one Gemma Scope transcoder."""
    with running() as hub:
        theirs = gemma_scope.write(folder / "theirs", *random_coder(D, D, (64,), per_latent=True).saved())
        path = "layer_17/width_16k/average_l0_12/params.npz"
        hub.repos[f"models/{GEMMA_SCOPE}"] = {path: (theirs / "params.npz").read_bytes()}
        offline = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0"}
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "MAKE"))}
        ours = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(folder / "hf"),
            "HF_TOKEN": TOKEN,
            "PYTHONPATH": str(ROOT),
        }
        yield kept | offline | ours | {"VENV": sys.prefix}


def test_every_snippet_runs_in_order(folder: Path, surroundings: dict[str, str], peer_python: Path) -> None:
    counts = {"make": 0, "ours": 0, "theirs": 0}
    for language, text in snippets():
        if language == "python":
            kind = "theirs" if any(f"from {name}" in text for name in OTHERS) else "ours"
            python = str(peer_python) if kind == "theirs" else sys.executable
            inputs = f"import torch\ninputs = torch.randn(7, {D})\n"
            at = text.replace("/full/path/to/", f"{folder}/")
            shape = "\nassert acts.shape == (7, 64)" if "acts = " in text else ""
            command = [python, "-c", f"{inputs}{at}{shape}"]
        else:
            # `install` is taken as done: the environment is the one that runs this test.
            kind, here = "make", f"make -f {ROOT}/Makefile -o install "
            command = ["bash", "-euc", re.sub(r"^make ", here, text, flags=re.M)]
        process = subprocess.run(
            command, cwd=folder, env=surroundings, capture_output=True, text=True, timeout=280, check=False
        )
        assert process.returncode == 0, f"{text}\n{process.stdout}\n{process.stderr}"
        counts[kind] += 1
    assert counts == {"make": 4, "ours": 1, "theirs": 3}
    assert (settings_in(folder, 12).run_dir() / "comparison" / "compare.json").is_file()

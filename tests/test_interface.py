"""What notebooks and scripts may rely on, line by line, and how our objects show themselves in a notebook."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from common.settings import ROOT
from evaluate.report import plots
from shards import Store
from tests.fixtures import make_store
from tests.train.runs import sparse_rows, tiny_settings
from train.loop import train
from transcoder import Transcoder


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A store and a finished run on it."""
    root = tmp_path_factory.mktemp("interface")
    settings = tiny_settings(root / "activations", root / "checkpoints", train__rows=64 * 40)
    store = make_store(settings.store_path(0), sparse_rows(3000, 0), sparse_rows(600, 1), storage="int8")
    train(settings, store)
    return Path(settings.store_path(0)), settings.run_dir()


def test_store(artifacts: tuple[Path, Path]) -> None:
    store = Store.open(str(artifacts[0]))
    assert store.manifest.source.d_in == 12
    assert (len(store.train), len(store.heldout)) == (3000, 600)
    inputs, outputs = store.train.rows(10, 30)
    assert (inputs.shape, outputs.shape) == ((20, 12), (20, 10))
    assert inputs.dtype == outputs.dtype == torch.float32
    seen = 0
    for inputs, outputs in store.train.loader(batch_size=1024, seed=0, epoch=0):
        assert (inputs.shape[1], outputs.shape[1]) == (12, 10)
        assert len(inputs) == len(outputs) <= 1024
        seen += len(inputs)
    assert seen == 3000 - 3000 % 1024


def test_transcoder(artifacts: tuple[Path, Path]) -> None:
    store, t = Store.open(artifacts[0]), Transcoder.load(str(artifacts[1]))
    inputs, _ = store.heldout.rows(0, 50)
    acts = t.encode(inputs)
    assert acts.shape == (50, t.d_sae)
    assert ((acts == 0) | (acts > t.threshold)).all()
    assert torch.allclose(t.decode(acts), t(inputs), atol=1e-5)
    assert t(inputs).shape == (50, 10)
    coarse = t.prefix(0)
    assert coarse.encode(inputs).shape == (50, t.prefix_ends[0])
    assert coarse(inputs).shape == (50, 10)
    shapes = [tuple(tensor.shape) for tensor in (t.W_enc, t.b_enc, t.W_dec, t.b_dec)]
    assert shapes == [(64, 12), (64,), (64, 10), (10,)]
    assert isinstance(t.threshold, float)
    assert t.prefix_ends == (8, 24, 64)


def test_objects_show_what_they_are(artifacts: tuple[Path, Path]) -> None:
    store, t = Store.open(artifacts[0]), Transcoder.load(artifacts[1])
    assert "3,000 train and 600 held-out rows, 12 -> 10, int8" in repr(store)
    assert "&#x27;" in store._repr_html_()  # escaped
    assert repr(store.heldout) == "StoreSplit(600 rows, 12 -> 10, int8)"
    assert repr(t).startswith("Transcoder(12 -> 10, 64 latents in prefixes 8/24/64, threshold ")
    page = t._repr_html_()
    assert "12 -&gt; 10" in page
    assert page.count("<tr>") == 4
    assert "<td>24</td>" in page
    manifest = repr(store.manifest)
    assert "gain=" not in manifest
    assert "second_moment=" not in manifest
    assert "n_layers=1" in manifest


def test_plots_are_figures_of_plain_values() -> None:
    """Without pyplot, whose state would keep every figure alive."""
    prefixes = [{"fvu": 0.5, "end": 8, "l0": 3.0}, {"fvu": None, "end": 24, "l0": 5.5}]
    drawn = [
        plots.fvu_by_prefix(prefixes, 0.1, 0.3, linear=0.4),
        plots.fvu_against_l0({"a": [(3.0, 0.5), (5.5, None)]}, linear=None),
        plots.loss_curve(
            [{"rows": 100, "loss": 1.0, "heldout_fvu/prefix_0": 0.5}, {"rows": 200, "loss": 0.5}]
        ),
        plots.cosine_histogram(
            {
                "nearest_cosine_histogram": np.ones(10),
                "nearest_cosine_edges": np.linspace(0, 1, 11),
                "limit": 0.9,
            }
        ),
    ]
    for figure in drawn:
        assert isinstance(figure, Figure)
        assert figure.canvas.get_width_height()[0] > 100


COMMANDS = (
    *("harvest", "shards", "train", "train.sweep", "train.samples_page"),
    *("evaluate", "evaluate.compare", "evaluate.read", "evaluate.push", "evaluate.runs", "evaluate.stores"),
    *("evaluate.absorption", "evaluate.explain", "evaluate.probe"),
    *("evaluate.export", "evaluate.model", "evaluate.circuit", "transcoder.import_"),
)


@pytest.mark.parametrize("stage", COMMANDS)
def test_help_and_typos_do_not_wait_for_torch(stage: str) -> None:
    """0.2 s instead of 2: the options are read before anything heavy is imported."""
    command = [sys.executable, "-X", "importtime", "-m", stage, "--help"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert process.returncode == 0
    assert "--layer" in process.stdout
    assert "pydantic" in process.stderr
    assert not [
        line for line in process.stderr.splitlines() if line.split("|")[-1].strip() in ("torch", "zarr")
    ]

"""Gemma Scope's format, the gain convention, and several transcoders on the same rows."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluate.compare import compare, distinct_names
from evaluate.foreign import convert, read
from evaluate.measure import measure
from evaluate.sparse import base_output
from pipeline import ROOT, InputError
from shards import Store
from tests.evaluate.fakes import random_coder, random_rows
from tests.evaluate.runs import D_IN, D_OUT, arguments, make_run, settings_of, tiny_transcoder
from tests.fixtures import make_store


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("compare")
    make_run(made)
    return made


def gemma_scope(folder: Path, **changes: np.ndarray) -> Path:
    """The tiny run's full dictionary as Gemma Scope would store it."""
    own = tiny_transcoder()
    folder.mkdir(parents=True)
    arrays = {
        "W_enc": own.W_enc.T.numpy(),
        "b_enc": own.b_enc.numpy(),
        "W_dec": own.W_dec.numpy(),
        "b_dec": own.b_dec.numpy(),
        "threshold": np.full(len(own.W_enc), own.threshold, np.float32),
    }
    np.savez(folder / "params.npz", **(arrays | changes))
    return folder


def test_a_gemma_scope_file_of_our_own_run_gives_identical_numbers(root: Path, tmp_path: Path) -> None:
    folder = gemma_scope(tmp_path / "width_24" / "average_l0_4")
    values, written = compare(settings_of(root), [str(folder)])
    own, theirs = values["lines"][2], values["lines"][3]
    for line in (own, theirs):
        del line["transcoder"], line["prefix"], line["difference"]
    assert own == theirs
    assert json.loads((written / "compare.json").read_text())["lines"][3]["difference"]["fvu"] == 0.0
    page = (written / "compare.html").read_text()
    assert "average_l0_4" in page
    assert "<script" not in page


def test_the_comparison_agrees_with_the_evaluation(root: Path, tmp_path: Path) -> None:
    values, _ = compare(settings_of(root), [str(gemma_scope(tmp_path / "theirs"))])
    store = Store.open(settings_of(root).store_path(0))
    own = read(settings_of(root).run_dir(), store)
    expected = measure(own, store.heldout, len(store.heldout), None, lambda _: None).result()["prefixes"]
    assert [line["fvu"] for line in values["lines"][:3]] == [prefix["fvu"] for prefix in expected]


@pytest.mark.parametrize("wanted", ["normalized", "mlp_in"])
def test_a_layer_norms_bias_is_converted_too(wanted: str) -> None:
    coder, rows = random_coder(5, 6, (9,), skip=True), random_rows(30, 5, 6)
    gain, bias = torch.tensor([0.5, -2.0, 3.0, 1.0, 0.1]), torch.tensor([1.0, 0.0, -0.3, 2.0, 0.7])
    found = "mlp_in" if wanted == "normalized" else "normalized"
    made = convert(coder, found, wanted, gain, "x", bias)
    fed = (rows.inputs - bias) / gain if wanted == "normalized" else rows.inputs * gain + bias
    assert torch.allclose(made.pre_activations(fed), coder.pre_activations(rows.inputs), atol=1e-4)
    assert torch.allclose(base_output(made, fed), base_output(coder, rows.inputs), atol=1e-4)
    assert not torch.allclose(made.b_enc, coder.b_enc)


def test_a_store_with_a_bias_is_read_with_it(root: Path, tmp_path: Path) -> None:
    """A run on inputs of the MLP, read for a store of a LayerNorm's normalized ones."""
    pair = random_rows(64, D_IN, D_OUT)
    rows, bias = (pair.inputs.numpy(), pair.outputs.numpy()), [0.5] * D_IN
    store = make_store(tmp_path / "s.zarr", rows, rows, gain=[2.0] * D_IN, gain_bias=bias)
    own = tiny_transcoder()
    run = tmp_path / "run"
    shutil.copytree(settings_of(root).run_dir(), run)
    record = json.loads((run / "settings.json").read_text())
    record["settings"]["harvest"]["input"] = "mlp_in"
    (run / "settings.json").write_text(json.dumps(record))
    found = read(run, store).pre_activations(pair.inputs)
    assert torch.allclose(found, own.pre_activations(pair.inputs * 2 + 0.5), atol=1e-4)


@pytest.mark.parametrize("wanted", ["normalized", "mlp_in"])
def test_the_gain_convention_is_exact_algebra(wanted: str) -> None:
    coder, rows = random_coder(5, 6, (9,), skip=True), random_rows(30, 5, 6)
    gain = torch.tensor([0.5, -2.0, 3.0, 1.0, 0.1])
    found = "mlp_in" if wanted == "normalized" else "normalized"
    made = convert(coder, found, wanted, gain, "x")
    fed = rows.inputs / gain if wanted == "normalized" else rows.inputs * gain
    assert torch.allclose(made.pre_activations(fed), coder.pre_activations(rows.inputs), atol=1e-5)
    assert made.W_skip is not None
    assert coder.W_skip is not None
    assert torch.allclose(fed @ made.W_skip.T, rows.inputs @ coder.W_skip.T, atol=1e-5)


def test_a_gain_of_zero_is_refused_unless_nothing_is_read_there() -> None:
    coder, gain = random_coder(5, 6, (9,)), torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0])
    assert torch.equal(convert(coder, "mlp_in", "normalized", gain, "x").W_enc[:, 1], torch.zeros(9))
    with pytest.raises(InputError, match="gain of dimension 1 is zero"):
        convert(coder, "normalized", "mlp_in", gain, "x")
    blind = replace(coder, W_enc=coder.W_enc * gain)
    assert torch.equal(convert(blind, "normalized", "mlp_in", gain, "x").W_enc, blind.W_enc)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threshold": np.zeros(3, np.float32)}, r"threshold: expected shape \(24,\), found \(3,\)"),
        ({"W_dec": np.zeros((24, 9), np.float32)}, r"W_dec: expected shape \(24, 5\), found \(24, 9\)"),
        ({"W_enc": np.array([{}], dtype=object)}, "not a readable .npz of plain arrays"),
    ],
)
def test_damaged_files_are_named(root: Path, tmp_path: Path, changes: dict, message: str) -> None:
    folder = gemma_scope(tmp_path / "bad", **changes)
    with pytest.raises(InputError, match=message):
        read(folder, Store.open(settings_of(root).store_path(0)))


def test_what_is_not_a_transcoder_or_too_wide_is_refused(root: Path, tmp_path: Path) -> None:
    store = Store.open(settings_of(root).store_path(0))
    with pytest.raises(InputError, match="found neither"):
        read(tmp_path, store)
    wide = gemma_scope(tmp_path / "wide", W_enc=np.zeros((7, 24), np.float32))
    with pytest.raises(InputError, match="expected widths 6 -> 5"):
        read(wide, store)
    with pytest.raises(InputError, match="give WITH="):
        compare(settings_of(root), [])


def test_the_command(root: Path, tmp_path: Path) -> None:
    folder = gemma_scope(tmp_path / "theirs")
    command = [sys.executable, "-m", "evaluate.compare", "--with", str(folder), *arguments(root)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "theirs" in done.stdout
    assert "compare.html" in done.stdout
    done = subprocess.run(
        [*command[:3], *arguments(root)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_names_are_as_short_as_they_can_be() -> None:
    assert distinct_names([Path("/a/x/run"), Path("/a/y/other")]) == ["run", "other"]
    assert distinct_names([Path("/a/x/run"), Path("/a/y/run")]) == ["x/run", "y/run"]
    with pytest.raises(InputError, match="given twice"):
        distinct_names([Path("/a/x"), Path("/a/x")])

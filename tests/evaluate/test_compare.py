"""Several transcoders, other tools' too, on the same rows."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common.errors import InputError
from common.settings import ROOT
from evaluate.compare import compare, distinct_names
from evaluate.metrics.measure import measure
from evaluate.run import evaluate
from evaluate.subject import read
from shards import Store
from tests.evaluate.runs import arguments, make_run, settings_of
from transcoder.export import export


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("compare")
    make_run(made)
    return made


@pytest.mark.parametrize("other", ["gemma_scope", "saelens"])
def test_our_own_run_in_another_format_gives_identical_numbers(root: Path, other: str) -> None:
    folder = export(settings_of(root).run_dir(), other)
    values, written = compare(settings_of(root), [str(folder)])
    own, theirs = values["lines"][2], values["lines"][3]
    for line in (own, theirs):
        del line["transcoder"], line["prefix"], line["difference"]
    assert own == theirs
    assert json.loads((written / "compare.json").read_text())["lines"][3]["difference"]["fvu"] == 0.0
    page = (written / "compare.html").read_text()
    assert folder.name in page
    assert "<script" not in page


def test_the_comparison_agrees_with_the_evaluation(root: Path) -> None:
    values, _ = compare(settings_of(root), [str(export(settings_of(root).run_dir(), "gemma_scope"))])
    store = Store.open(settings_of(root).store_path(0))
    own = read(settings_of(root).run_dir(), store)
    expected = measure(own, store.heldout, len(store.heldout), None, lambda _: None).result()["prefixes"]
    assert [line["fvu"] for line in values["lines"][:3]] == [prefix["fvu"] for prefix in expected]


def test_what_is_not_a_transcoder_or_too_wide_is_refused(root: Path, tmp_path: Path) -> None:
    store = Store.open(settings_of(root).store_path(0))
    with pytest.raises(InputError, match=r"no transcoder here; .*params\.npz"):
        read(tmp_path, store)
    shapes = {"W_enc": (7, 24), "b_enc": (24,), "W_dec": (24, 5), "b_dec": (5,), "threshold": (24,)}
    np.savez(tmp_path / "params.npz", **{name: np.ones(shape, np.float32) for name, shape in shapes.items()})
    with pytest.raises(InputError, match="expected widths 6 -> 5"):
        read(tmp_path, store)
    with pytest.raises(InputError, match="give WITH="):
        compare(settings_of(root), [])


def test_the_command(root: Path) -> None:
    folder = export(settings_of(root).run_dir(), "gemma_scope", prefix=1)
    command = [sys.executable, "-m", "evaluate.compare", "--with", str(folder), *arguments(root)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert folder.name in done.stdout
    assert "compare.html" in done.stdout
    done = subprocess.run(
        [*command[:3], *arguments(root)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_an_imported_transcoder_is_evaluated_like_a_run(root: Path) -> None:
    folder = export(settings_of(root).run_dir(), "saelens")
    command = [
        sys.executable,
        "-m",
        "transcoder.import_",
        "--from",
        str(folder),
        *arguments(root),
        "--run",
        "theirs",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    theirs, _ = evaluate(settings_of(root, "--run", "theirs"), ce_tokens=0)
    own, _ = evaluate(settings_of(root), ce_tokens=0)
    assert theirs["prefixes"][0]["fvu"] == own["prefixes"][-1]["fvu"]


def test_names_are_as_short_as_they_can_be() -> None:
    assert distinct_names([Path("/a/x/run"), Path("/a/y/other")]) == ["run", "other"]
    assert distinct_names([Path("/a/x/run"), Path("/a/y/run")]) == ["x/run", "y/run"]
    with pytest.raises(InputError, match="given twice"):
        distinct_names([Path("/a/x"), Path("/a/x")])

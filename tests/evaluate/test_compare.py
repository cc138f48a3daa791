"""Several transcoders, other tools' too, on the same rows."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common.errors import InputError
from common.settings import ROOT, Evaluate
from evaluate.compare import chosen, compare, distinct_names
from evaluate.metrics.measure import measure
from evaluate.run import evaluate
from evaluate.subject import read
from shards import Store
from tests.evaluate.fakes import random_coder
from tests.evaluate.runs import D_IN, D_OUT, ENDS, arguments, make_run, settings_of, tiny_transcoder
from train.sweep import RESULTS
from transcoder.export import export


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    make_run(folder)
    return folder


@pytest.mark.parametrize("other", ["gemma_scope", "saelens"])
def test_our_own_run_in_another_format_gives_identical_numbers(root: Path, other: str) -> None:
    folder = export(settings_of(root).run_dir(), other)
    values, written = compare(settings_of(root), [str(folder)])
    own, theirs = (values.lines[g].written() for g in (2, -1))  # the whole dictionary of each
    for line in (own, theirs):
        del line["transcoder"], line["prefix"], line["difference"]
    assert own == theirs
    assert json.loads((written / "compare.json").read_text())["lines"][-1]["difference"]["fvu"] == 0.0
    page = (written / "compare.html").read_text()
    assert folder.name in page
    assert "<script" not in page


def test_the_comparison_agrees_with_the_evaluation(root: Path) -> None:
    values, _ = compare(settings_of(root), [str(export(settings_of(root).run_dir(), "gemma_scope"))])
    store = Store.open(settings_of(root).store_path(0))
    own = read(settings_of(root).run_dir(), store)
    expected = measure(own, store.heldout, len(store.heldout), None, lambda _: None).result()
    assert [line.fvu for line in values.lines[:3]] == [prefix.fvu for prefix in expected]


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


def test_the_command_prints_the_table_and_the_page(root: Path) -> None:
    folder = export(settings_of(root).run_dir(), "gemma_scope", prefix=1)
    command = [sys.executable, "-m", "evaluate.compare", "--with", str(folder), *arguments(root)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    assert folder.name in process.stdout
    assert "compare.html" in process.stdout
    process = subprocess.run(
        [*command[:3], *arguments(root)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (process.returncode, process.stderr.count("\n")) == (2, 1)


def test_a_comparison_with_others_is_kept(root: Path) -> None:
    settings = settings_of(root)
    shutil.rmtree(settings.run_dir() / "comparison", ignore_errors=True)
    one, other = (str(export(settings.run_dir(), "gemma_scope", prefix=g)) for g in (0, 1))
    _, folder = compare(settings, [one])
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    compare(settings, [one])  # the same again
    compare(settings, [one, other])  # and one more: nothing is lost
    assert not (folder / "earlier").exists()
    both = json.loads((folder / "compare.json").read_text())
    compare(settings, [one])
    (kept,) = (folder / "earlier").iterdir()
    assert json.loads((kept / "compare.json").read_text()) == both
    assert {file.name for file in kept.iterdir()} == before.keys()
    assert (folder / "compare.json").read_bytes() == before["compare.json"]
    compare(settings.model_copy(update={"evaluate": Evaluate(rows=100)}), [one])  # other rows
    assert len(list((folder / "earlier").iterdir())) == 2
    (folder / "compare.json").write_text("[")
    compare(settings, [one])
    assert len(list((folder / "earlier").iterdir())) == 3


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
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    theirs, _ = evaluate(settings_of(root, "--run", "theirs"), ce_tokens=0)
    own, _ = evaluate(settings_of(root), ce_tokens=0)
    assert [prefix.fvu for prefix in theirs.prefixes] == [prefix.fvu for prefix in own.prefixes]


def test_names_are_as_short_as_they_can_be() -> None:
    assert distinct_names([Path("/a/x/run"), Path("/a/y/other")]) == ["run", "other"]
    assert distinct_names([Path("/a/x/run"), Path("/a/y/run")]) == ["x/run", "y/run"]
    with pytest.raises(InputError, match="given twice"):
        distinct_names([Path("/a/x"), Path("/a/x")])


def test_other_runs_are_named_or_matched(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run's name, a pattern of names, what the shell makes of a glob; what is no other run is left out and told."""
    layer = tmp_path / "layer_0"
    for name, seed in (("a", 0), ("b-k4", 1), ("b-k8", 2)):
        tiny_transcoder(seed).save(layer / name)
    (layer / "b-sweep").mkdir()
    (layer / "b-sweep" / RESULTS).write_text("[]")
    (layer / "b-begun").mkdir()
    settings = settings_of(root).model_dump(mode="json")
    (layer / "b-begun" / "settings.json").write_text(
        json.dumps({"settings": settings, "harvest_fingerprint": "f", "d_in": 6})
    )
    own, both = layer / "a", [layer / "b-k4", layer / "b-k8"]
    assert chosen(own, ["b-k4", "b-k8"]) == both
    assert capsys.readouterr().err == ""
    for words in (["*"], [str(path) for path in sorted(layer.iterdir())]):
        assert chosen(own, words) == both
        told = capsys.readouterr().err.splitlines()
        assert [line.split(": ")[1].rpartition("/")[2] for line in told] == ["a", "b-begun", "b-sweep"]
        assert "it is the run itself" in told[0]
        assert "interrupted, or still training, before its first checkpoint" in told[1]
        assert "it is the table of a sweep" in told[2]
    assert chosen(own, ["b-k*"]) == both
    assert chosen(own, ["b-k4", str(layer / "b-k4"), "b-k8"]) == both
    for words, message in (
        (["absent"], r"compare: absent: neither a run of this layer \(a b-k4 b-k8\) nor a path"),
        (["b-k4", "c*"], r"compare: c\*: neither a run"),
        (["b-sweep"], "nothing is left to compare with: .*b-sweep: it is the table of a sweep"),
        (["b-begun"], "nothing is left to compare with: .*b-begun: interrupted"),
    ):
        with pytest.raises(InputError, match=message):
            chosen(own, words)


def test_a_runs_name_comes_before_a_path_of_the_same_spelling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("layer_0/a", "layer_0/b", "b", "c"):
        tiny_transcoder().save(folder)
    own = Path("layer_0/a")
    assert chosen(own, ["b", "./b", "c"]) == [Path("layer_0/b"), Path("b"), Path("c")]


def test_a_run_of_another_layer_is_compared_on_purpose_only(root: Path) -> None:
    run_dir = settings_of(root).run_dir()
    random_coder(D_IN, D_OUT, ENDS, layer=3).save(run_dir.with_name("other"))
    with pytest.raises(InputError, match=r"other: does not belong to .*it is of layer 3, there 0"):
        compare(settings_of(root), ["other"])
    values, _ = compare(settings_of(root, "--evaluate.allow_mismatch", "true"), ["other"])
    assert {line.transcoder for line in values.lines} == {"tiny", "other"}
    export_of_another = export(run_dir, "saelens")
    config = json.loads((export_of_another / "cfg.json").read_text())
    config["metadata"]["hook_name"] = "blocks.3.ln2.hook_normalized"
    (export_of_another / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="it is of layer 3, there 0"):
        compare(settings_of(root), [str(export_of_another)])

"""Several transcoders, other tools' too, on the same rows."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from common.errors import InputError
from common.files import sha256
from common.settings import ROOT, Evaluate
from evaluate.compare import chosen, compare, differing, distinct_names, known_settings, show
from evaluate.comparison.records import Comparison
from evaluate.files import write_record
from evaluate.metrics.measure import measure
from evaluate.records import AblationLosses, LanguageMetrics, Metrics
from evaluate.run import evaluate
from evaluate.subject import read
from shards import Store
from tests.evaluate.fakes import random_coder
from tests.evaluate.runs import D_IN, D_OUT, ENDS, K, arguments, make_run, settings_of, tiny_transcoder
from train.sweep import RESULTS
from transcoder import heavy, weights
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
        del line["transcoder"], line["prefix"], line["difference"], line["equal_latents"]
    assert own == theirs
    assert json.loads((written / "compare.json").read_text())["lines"][-1]["difference"]["fvu"] == 0.0
    page = (written / "compare.html").read_text()
    assert folder.name in page
    assert page.count("<script") == 1


def test_the_comparison_agrees_with_the_evaluation(root: Path) -> None:
    values, _ = compare(settings_of(root), [str(export(settings_of(root).run_dir(), "gemma_scope"))])
    store = Store.open(settings_of(root).store_path(0))
    own = read(settings_of(root).run_dir(), store)
    expected = measure(own, store.heldout, len(store.heldout), None, lambda _: None).result()
    assert [line.fvu for line in values.lines[:3]] == [prefix.fvu for prefix in expected]


def test_heavy_rows_are_left_out_as_in_the_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows twice as far as the median row are heavy here; at equal L0 the FVU is that of the others."""
    make_run(tmp_path)
    monkeypatch.setattr(heavy, "HEAVY", 2.0)
    settings = settings_of(tmp_path)
    errors = evaluate(settings, ce_tokens=0)[0].errors
    other = settings.run_dir().with_name("other")
    random_coder(D_IN, D_OUT, ENDS, seed=5).save(other)
    values, folder = compare(settings, ["other"])
    assert errors.heavy is not None
    assert values.heavy_rows == errors.heavy.rows
    own = [line.fvu_typical for line in values.lines[:3]]
    assert own == pytest.approx(errors.typical.fvu)
    assert {each.run_fvu for each in values.equal_l0 if each.transcoder == "tiny"} <= {*own}
    console = Console(file=io.StringIO(), width=120)
    show(values, folder, console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"{own[0]:.3f}" in said
    assert f"† FVU without heavy rows ({values.heavy_rows:,})" in said
    assert "FVU without heavy rows†" in (folder / "compare.html").read_text()


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
        (["absent"], r"with: absent: neither a run of this layer \(a b-k4 b-k8\) nor a path"),
        (["b-k4", "c*"], r"with: c\*: neither a run"),
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


def with_cross_entropy(run_dir: Path, metrics: Metrics, recovered: float) -> None:
    """An evaluation of the run's weights, with a cross-entropy that no language model has measured."""
    language = LanguageMetrics(cross_entropy=3.0, kl=0.5, recovered_zero=recovered, recovered_mean=0.1)
    losses = AblationLosses(skipped=None, contexts=2, positions=62, clean=2.0, zero=4.0, mean=3.5)
    of = {
        "prefixes": [each.model_copy(update={"cross_entropy": language}) for each in metrics.prefixes],
        "cross_entropy": losses,
        "provenance": metrics.provenance.model_copy(
            update={"weights_sha256": sha256(run_dir / weights.FILE_NAME)}
        ),
    }
    write_record(run_dir / "evaluation" / "metrics.json", metrics.model_copy(update=of))


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs "tiny" and "other", both evaluated with a cross-entropy; plots, which take longest, are left out."""
    folder = tmp_path_factory.mktemp("evaluated")
    make_run(folder)
    run_dir = settings_of(folder).run_dir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluate.run.draw", lambda *_: [])
        metrics, _ = evaluate(settings_of(folder), ce_tokens=0)
    other = run_dir.with_name("other")
    shutil.copytree(run_dir, other)
    changes = {"train": {"lr": 0.002}, "transcoder": {"k": 5}}
    weights.write(other / weights.FILE_NAME, *_changed(run_dir, changes))
    with_cross_entropy(run_dir, metrics, 0.5)
    with_cross_entropy(other, metrics, 0.75)
    return folder


def _changed(run_dir: Path, more: dict[str, dict[str, object]]) -> tuple[dict, dict]:
    tensors, metadata = weights.read(run_dir)
    for section, values in more.items():
        metadata["settings"][section] |= values
    return tensors, metadata


def test_cross_entropy_and_report_are_those_of_the_evaluations(evaluated: Path) -> None:
    theirs = export(settings_of(evaluated).run_dir(), "gemma_scope")
    values, folder = compare(settings_of(evaluated), ["other", str(theirs)])
    by_name = {name: [line for line in values.lines if line.transcoder == name] for name in _names(values)}
    tiny, other, file = by_name.values()
    assert [line.cross_entropy and line.cross_entropy.recovered_zero for line in (*tiny, *other)] == [
        0.5
    ] * 3 + [0.75] * 3
    assert file[0].cross_entropy is None
    assert [line.difference.recovered_zero for line in other] == [0.25] * 3
    assert file[0].difference.recovered_zero is None
    assert [each.cross_entropy and each.cross_entropy.positions for each in values.transcoders] == [
        62,
        62,
        None,
    ]
    reports = [each.report for each in values.transcoders]
    assert reports == ["../evaluation/report.html", "../../other/evaluation/report.html", None]
    assert all((folder / report).is_file() for report in reports if report)
    assert values.differing_settings == {
        "transcoder.k": {"tiny": K, "other": 5},
        "train.lr": {"tiny": None, "other": 0.002},
    }
    assert [each.known_settings for each in values.transcoders] == [True, True, False]
    page = (folder / "compare.html").read_text()
    assert page.count('href="../../other/evaluation/report.html"') == 3
    assert f"Not known of {values.transcoders[2].transcoder}" in page
    said = io.StringIO()
    show(values, folder, Console(width=80, file=said))
    assert "75.0" in said.getvalue()


def _names(values: Comparison) -> list[str]:
    return [each.transcoder for each in values.transcoders]


def test_an_evaluation_of_other_weights_split_or_store_gives_no_cross_entropy(evaluated: Path) -> None:
    settings = settings_of(evaluated, "--evaluate.split", "train")
    values, _ = compare(settings, ["other"])
    assert all(line.cross_entropy is None for line in values.lines)
    assert [each.report for each in values.transcoders] == [
        "../evaluation/report.html",
        "../../other/evaluation/report.html",
    ]
    copy = settings.run_dir().with_name("copy")
    shutil.copytree(settings.run_dir(), copy)
    tiny_transcoder(7).save(copy)
    values, _ = compare(settings_of(evaluated), ["copy"])
    assert [each.report for each in values.transcoders] == ["../evaluation/report.html", None]
    assert values.lines[-1].cross_entropy is None


def test_an_evaluation_that_cannot_be_read_is_told(
    evaluated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = settings_of(evaluated).run_dir().with_name("damaged")
    shutil.copytree(settings_of(evaluated).run_dir(), run_dir)
    (run_dir / "evaluation" / "metrics.json").write_text("{")
    values, _ = compare(settings_of(evaluated), ["damaged"])
    assert values.transcoders[1].report is None
    assert (
        f"left out, report and cross-entropy: {run_dir}/evaluation/metrics.json: cannot be read"
        in capsys.readouterr().err
    )


def test_what_auto_and_multiples_stood_for_is_compared() -> None:
    asked = {"transcoder": {"d_sae": "8x", "group_sizes": ["1x"], "k": 4}, "train": {"lr": "auto", "seed": 0}}
    own = {"settings": asked, "used": {"lr": 0.001, "precision": "float32"}, "harvest_fingerprint": "f" * 64}
    plain = {"settings": {**asked, "train": {"lr": 0.001, "seed": 1}}, "harvest_fingerprint": "e" * 64}
    assert known_settings({}, (4,)) is None
    assert differing(
        {"a": known_settings(own, (2, 8)), "b": known_settings(plain, (8,)), "c": known_settings({}, (8,))}
    ) == {
        "transcoder.group_sizes": {"a": [2, 6], "b": [8]},
        "train.seed": {"a": 0, "b": 1},
        "harvest": {"a": "ffffffff", "b": "eeeeeeee"},
    }
    assert differing({"a": known_settings(own, (2, 8)), "c": None}) == {}
    assert differing({"a": {"train.lr": 1}, "b": {"train.lr": 1, "train.new": 2}}) == {"train.new": {"b": 2}}

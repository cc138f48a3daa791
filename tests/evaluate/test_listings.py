"""make runs and make stores; which run is evaluated where none is named."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import InputError
from common.settings import Settings
from evaluate import compare, export, push, read, stores
from evaluate import runs as listing
from evaluate.__main__ import main as evaluate_main
from evaluate.files import write_record
from evaluate.run import evaluate
from tests.evaluate.runs import arguments, make_run, settings_of, tiny_transcoder
from train import samples_page
from transcoder.weights import chosen_run, read_metadata


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_run(tmp_path)
    return tmp_path


def shown(
    main: object, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *more: str
) -> str:
    paths = [
        "--paths.activations",
        str(root / "activations"),
        "--paths.checkpoints",
        str(root / "checkpoints"),
    ]
    monkeypatch.setattr("sys.argv", ["x", *paths, *more])
    monkeypatch.delenv("COLUMNS", raising=False)
    main()  # type: ignore[operator]
    return capsys.readouterr().out


def evaluation(settings: Settings, split: str = "heldout") -> None:
    """Of numbers that no other file has."""
    metrics, _ = evaluate(settings, ce_tokens=0)
    last = metrics.prefixes[-1].model_copy(update={"fvu": 0.123, "l0": 4.5, "dead_fraction": 0.25})
    of = metrics.provenance.model_copy(update={"split": split})
    changed = metrics.model_copy(update={"prefixes": [*metrics.prefixes[:-1], last], "provenance": of})
    write_record(settings.run_dir() / "evaluation" / "metrics.json", changed)


def test_a_run_on_heavy_rows_shows_the_fvu_without_them(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = settings_of(root).run_dir()
    metrics, _ = evaluate(settings_of(root), ce_tokens=0)
    typical = metrics.errors.typical.model_copy(update={"fvu": [0.7, 0.6, 0.442]})
    errors = metrics.errors.model_copy(update={"typical": typical, "heavy": typical, "heavy_variance": 0.99})
    assert "†" not in shown(listing.main, root, monkeypatch, capsys)
    write_record(run_dir / "evaluation" / "metrics.json", metrics.model_copy(update={"errors": errors}))
    said = shown(listing.main, root, monkeypatch, capsys)
    assert "0.442†" in said
    assert said.count("† FVU without heavy rows") == 1


def test_runs_of_every_kind(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = settings_of(root).run_dir()
    line = listing.line_of(tiny)
    expected = {"model": "tiny", "layer": "0", "run": "tiny", "k": "4", "latents": "24", "evaluated": "no"}
    assert {key: line[key] for key in expected} == expected
    evaluation(settings_of(root))
    line = listing.line_of(tiny)
    assert [line[key] for key in ("FVU", "L0", "dead %", "evaluated")] == ["0.123", "4.5", "25.0", "yes"]
    evaluation(settings_of(root), "train")
    assert listing.line_of(tiny)["evaluated"] == "on train rows"
    os.utime(tiny / "evaluation" / "metrics.json", (0, 0))  # as a copy may have it
    assert listing.line_of(tiny)["evaluated"] == "on train rows"
    replace(tiny_transcoder(), metadata=read_metadata(tiny) | {"another": "training"}).save(tiny)
    assert listing.line_of(tiny)["evaluated"] == "before it was trained on"

    evaluate(settings_of(root, "--evaluate.split", "train"), ce_tokens=0)
    assert (
        listing.line_of(tiny)["evaluated"] == "on train rows"
    )  # of these weights; the main one is of others
    assert (tiny / "evaluation" / "metrics.json").exists()

    tiny_transcoder().save(tiny.with_name("imported"))
    begun = tiny.with_name("begun") / "state"
    (begun / "step_30").mkdir(parents=True)
    (begun / "latest").write_text("step_30\n")
    (begun / "step_30" / "state.json").write_text(json.dumps({"step": 30, "rows": 30_720}))
    (begun.parent / "settings.json").write_text((tiny / "settings.json").read_text())
    (tiny.with_name("damaged")).mkdir()
    (tiny.with_name("damaged") / "settings.json").write_text("{")
    (tiny.with_name("s-sweep")).mkdir()  # a sweep's table is no run
    printed = shown(listing.main, root, monkeypatch, capsys)
    assert "no (imported)" in printed
    assert "interrupted at step 30" in printed
    assert "30,720 of 15,000,000" in printed
    assert "cannot be read: Expecting property name" in printed
    assert "sweep" not in printed
    assert len([line for line in printed.splitlines() if "│" in line]) == 4
    assert "no runs in" in shown(listing.main, root, monkeypatch, capsys, "--layer", "1")


def test_layers_are_in_their_order_and_only_those_asked_for(tmp_path: Path) -> None:
    for layer in (10, 9, 2):
        tiny_transcoder().save(tmp_path / "transcoder" / "m" / f"layer_{layer}" / "a")
    assert [path.parts[-2] for path in listing.runs_of(tmp_path)] == ["layer_2", "layer_9", "layer_10"]
    assert [path.parts[-2] for path in listing.runs_of(tmp_path, (9,))] == ["layer_9"]


def test_stores(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    activations = root / "activations" / "tiny"
    (activations / "layer_2_my_own.zarr" / ".harvest" / "records").mkdir(parents=True)
    (activations / "layer_2_my_own.zarr" / ".harvest" / "records" / "train-000000.json").write_text("{}")
    printed = shown(stores.main, root, monkeypatch, capsys)
    (whole, begun) = (line.split("│") for line in printed.splitlines() if "│" in line)
    assert printed.splitlines()[0] == "tiny"
    assert [cell.strip() for cell in whole[1:8]] == [
        *("0", "-", "2,000", "1,500", "6 -> 5", "float32", "normalized"),
    ]
    assert whole[9].strip() == "complete"
    assert [cell.strip() for cell in begun[1:3]] == ["2", "my_own"]
    assert begun[9].strip() == "unfinished, 1 windows of 32,768 rows"
    (activations / "layer_0.zarr" / "zarr.json").write_text("{")
    assert "cannot be read: Expecting property name" in shown(
        stores.main, root, monkeypatch, capsys, "--layer", "0"
    )


def test_evaluate_without_a_name_takes_the_newest_run(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = settings_of(root).run_dir()
    for name, age in (("default", 1000), ("newer", 2000), ("tiny", 500)):
        tiny_transcoder().save(tiny.with_name(name))
        os.utime(tiny.with_name(name) / "transcoder.safetensors", (age, age))
    unnamed = settings_of(root).model_copy(update={"run": "default"})

    def chosen(settings: Settings, every_layer: bool = False) -> tuple[str, str]:
        run = chosen_run(settings, None, every_layer).run
        return run, capsys.readouterr().err

    newest = "run newer, the newest of 3 runs of layer 0; RUN=name takes another\n"
    assert chosen(unnamed) == ("newer", newest)
    by_profile = unnamed.model_copy(update={"run": "tiny"})  # as a profile's name is
    assert chosen(by_profile) == ("tiny", "run tiny, by its settings; the newest is newer (RUN=newer)\n")
    assert chosen(unnamed.model_copy(update={"run": "default-k7"})) == ("newer", newest)
    assert chosen_run(unnamed, "default") == unnamed
    assert chosen(unnamed.model_copy(update={"layers": (5,)})) == ("default", "")
    other = tiny.parent.with_name("layer_3") / "deep"
    tiny_transcoder().save(other)
    every = unnamed.model_copy(update={"layers": ()})
    assert chosen(every, every_layer=True) == (
        "deep",
        "run deep, the newest of 4 that most layers have (1 of 2); RUN=name takes another\n",
    )
    tiny_transcoder().save(other.with_name("default"))
    os.utime(other.with_name("default") / "transcoder.safetensors", (1, 1))
    tiny_transcoder().save(tiny.parent.with_name("layer_3_old") / "newest")  # a copy put aside is no layer
    both = "run default, the one that all 2 layers have; RUN=name takes another\n"
    assert chosen(every, every_layer=True) == ("default", both)
    assert chosen(every.model_copy(update={"layers": (0, 3)}), every_layer=True) == ("default", both)
    assert chosen(every.model_copy(update={"layers": (3,)}), every_layer=True)[0] == "deep"
    of_three = every.model_copy(update={"layers": (0, 3, 5)})
    assert chosen(of_three, every_layer=True) == (
        "default",
        "run default, the one that most layers have (2 of 3); RUN=name takes another\n",
    )

    seen = []
    monkeypatch.setattr("evaluate.run.evaluate", lambda settings, _: seen.append(settings.run) or ({}, False))
    monkeypatch.setattr("evaluate.__main__.show", lambda *_: None)
    words = arguments(root)
    monkeypatch.setattr("sys.argv", ["x", *words[:2], *words[4:]])
    evaluate_main()
    monkeypatch.setattr("sys.argv", ["x", *words])
    evaluate_main()
    assert seen == ["newer", "tiny"]
    assert capsys.readouterr().err.count("run newer, the newest of 3 runs of layer 0") == 1


@pytest.mark.parametrize("stage", ["read", "compare", "push", "export", "samples"])
def test_every_stage_that_reads_a_run_takes_the_same(
    stage: str, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = settings_of(root).run_dir()
    run.rename(run.with_name("newest"))  # the one there is
    main, own = {
        "read": (read.main, ("--text", "a", "--evaluate.checkpoint", "true")),
        "compare": (compare.main, ("--with", "no such run")),
        "push": (push.main, ("--repo", "no repository")),
        "export": (export.main, ("--format", "saelens", "--prefix", "99")),
        "samples": (samples_page.main, ("--latents", "999")),
    }[stage]
    words = arguments(root)
    monkeypatch.setattr("sys.argv", ["x", *words[:2], *words[4:], *own])
    with pytest.raises(InputError):  # of what was asked wrongly, after the run was chosen
        main()
    assert capsys.readouterr().err == "run newest, the newest of layer 0\n"


def begin(run_dir: Path, age: float, checkpoint: float | None = None) -> None:
    """What a run without weights has: settings, and perhaps a checkpoint."""
    state = run_dir / "state"
    state.mkdir(parents=True)
    settings = (run_dir.with_name("tiny") / "settings.json").read_text()
    (run_dir / "settings.json").write_text(settings)
    os.utime(run_dir / "settings.json", (age, age))
    if checkpoint is not None:
        (state / "latest").write_text("step_30\n")
        os.utime(state / "latest", (checkpoint, checkpoint))


def test_the_newest_checkpoint_is_taken_where_one_is_asked_for(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of runs that are finished or not; a finished run without one, an imported one, is none of them."""
    tiny = settings_of(root).run_dir()
    for file in ("transcoder.safetensors", "settings.json"):
        os.utime(tiny / file, (500, 500))
    begin(tiny.with_name("stopped"), 2000, checkpoint=3000)
    begin(tiny.with_name("older"), 2500, checkpoint=2600)
    begin(tiny.with_name("fresh"), 4000)
    unnamed = settings_of(root).model_copy(update={"run": "default"})
    wanted = settings_of(root, "--evaluate.checkpoint", "true").model_copy(update={"run": "default"})
    assert chosen_run(wanted, None).run == "stopped"
    line = "run stopped, the newest checkpoint of 2 runs of layer 0; RUN=name takes another\n"
    assert capsys.readouterr().err == line
    assert chosen_run(wanted.model_copy(update={"run": "older"}), None).run == "older"
    assert capsys.readouterr().err == "run older, by its settings; the newest is stopped (RUN=stopped)\n"
    assert chosen_run(unnamed, None).run == "tiny"
    line = "run tiny, the newest of layer 0\nbegun later, not finished: fresh, older, stopped\n"
    assert capsys.readouterr().err == line
    (tiny / "state").mkdir()
    (tiny / "state/latest").write_text("step_1\n")
    assert chosen_run(wanted, None).run == "tiny"


@pytest.mark.parametrize("stage", ["evaluate", "read", "samples", "export"])
def test_where_no_run_is_finished_the_newest_says_how_far_it_is(
    stage: str, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = settings_of(root).run_dir()
    begin(tiny.with_name("stopped"), 2000, checkpoint=3000)
    (tiny / "transcoder.safetensors").unlink()
    os.utime(tiny / "settings.json", (1000, 1000))
    main, own = {
        "evaluate": (evaluate_main, ()),
        "read": (read.main, ("--text", "a")),
        "export": (export.main, ("--format", "saelens")),
        "samples": (samples_page.main, ()),
    }[stage]
    words = arguments(root)
    monkeypatch.setattr("sys.argv", ["x", *words[:2], *words[4:], *own])
    with pytest.raises(InputError, match=r"layer_0/stopped: interrupted, or still training"):
        main()
    said = "run stopped, the newest of 2 runs of layer 0; RUN=name takes another\n"
    assert capsys.readouterr().err.startswith(said)

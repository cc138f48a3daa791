"""From a store and a run directory on disk to metrics.json, plots and the page, through the command line."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors import safe_open

from common.errors import InputError
from common.settings import ROOT, Settings
from evaluate import runs as listing
from evaluate.__main__ import show
from evaluate.files import finished, read_json, read_lines, write_record
from evaluate.kept.evaluations import find, make_room, read_all, settle
from evaluate.records import Metrics
from evaluate.run import evaluate as evaluate_with
from shards import Store
from tests.evaluate.fakes import random_coder, random_rows
from tests.evaluate.runs import D_IN, D_OUT, ENDS, arguments, make_run, settings_of, tiny_transcoder
from tests.fixtures import make_store
from train.loop import Run, train
from transcoder import Transcoder

ALLOWED = ("--evaluate.allow_mismatch", "true")
SMALL = (
    *("--transcoder.d_sae", "24", "--transcoder.group_sizes", "4,6,14", "--transcoder.k", "4"),
    *("--train.rows", "512", "--train.batch_size", "64", "--train.aux_k", "4", "--wandb.mode", "disabled"),
)


def evaluate(settings: Settings) -> tuple[dict, bool]:
    """Without the language model, as metrics.json has it."""
    metrics, fresh = evaluate_with(settings, ce_tokens=0)
    return metrics.written(), fresh


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    make_run(folder)
    evaluate(settings_of(folder))
    return folder


def metrics_of(root: Path) -> dict:
    return json.loads((settings_of(root).run_dir() / "evaluation" / "metrics.json").read_text())


def test_metrics_have_the_fields_of_the_interface(root: Path) -> None:
    metrics = metrics_of(root)
    assert metrics["rows"] == 1500
    assert [prefix["end"] for prefix in metrics["prefixes"]] == list(ENDS)
    for prefix in metrics["prefixes"]:
        fields = {"end", "fvu", "mse", "mae", "cosine", "l0", "threshold", "dead_fraction", "cross_entropy"}
        assert fields <= prefix.keys()
    assert {"latents", "redundancy", "provenance"} <= metrics.keys()
    assert metrics["provenance"]["split"] == "heldout"


def test_every_file_is_there_and_no_scratch_is_left(root: Path) -> None:
    folder = settings_of(root).run_dir() / "evaluation"
    names = {path.name for path in folder.iterdir()}
    assert names == {*metrics_of(root)["files"], "metrics.json"}
    assert {"report.html", "latents.safetensors", "loss.png", "fvu.png", "l0.png", "density.png"} <= names
    for png in folder.glob("*.png"):
        assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_again_does_nothing_and_a_change_measures_again(root: Path) -> None:
    folder = settings_of(root).run_dir() / "evaluation"
    stamps = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    metrics, fresh = evaluate(settings_of(root))
    assert not fresh
    assert metrics == metrics_of(root)
    assert stamps == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    own = Transcoder.load(settings_of(root).run_dir())
    tiny_transcoder(seed=5).save(settings_of(root).run_dir())
    assert evaluate(settings_of(root))[1]
    (folder / "fvu.png").unlink()
    assert evaluate(settings_of(root))[1]
    own.save(settings_of(root).run_dir())
    assert evaluate(settings_of(root))[1]


def contents(folder: Path, *without: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in without}


OTHERS: list[dict[str, object]] = [{"split": "train"}, {"rows": 3}, {"store_fingerprint": "d" * 64}]
OTHERS += [{"cross_entropy_tokens": 512}, {"skipped": "no model"}]
"""How an evaluation differs from the one that is there, which has the cross-entropy."""


@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_an_evaluation_of_something_else_is_kept(other: dict, root: Path, tmp_path: Path) -> None:
    """Another split, number of rows, harvest, or without the cross-entropy; one of the same rows gives way."""

    def of(**changes: object) -> Metrics:
        provenance = (
            metrics_of(root)["provenance"] | {"split": "heldout", "cross_entropy_tokens": 64} | changes
        )
        skipped = provenance.pop("skipped", None)
        losses = {"skipped": None, "contexts": 1, "positions": 1, "clean": 1.0, "zero": 2.0, "mean": 2.0}
        said = {"skipped": skipped} if skipped else losses
        values = metrics_of(root) | {"cross_entropy": said, "provenance": provenance, "files": []}
        return Metrics.model_validate(values)

    folder = tmp_path / "evaluation"
    folder.mkdir()
    write_record(folder / "metrics.json", of(weights_sha256="old"))
    make_room(folder, of(weights_sha256="new"))
    assert finished(folder) == of(weights_sha256="old")
    make_room(folder, of(**other))
    assert not folder.exists()
    (kept,) = (tmp_path / "evaluations").iterdir()
    assert finished(kept) == of(weights_sha256="old")
    found = find(read_all(tmp_path), of(weights_sha256="old").provenance)
    assert found is not None
    assert found == (kept, of(weights_sha256="old"))
    settle(found, folder)
    assert finished(folder) == of(weights_sha256="old")


def test_an_evaluation_that_is_there_is_read_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    monkeypatch.setattr(
        "evaluate.files.read_json", lambda path, remedy: reads.append(path) or read_json(path, remedy)
    )
    assert evaluate(settings_of(root)) == (metrics_of(root), False)
    assert len(reads) == len({*reads}) + 1  # once for where it belongs


def test_that_only_the_models_name_is_another_one_is_said_once(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    run_dir = settings_of(tmp_path, "--run", "imported").run_dir()
    said = {"source": {"model": "elsewhere/other", "layer": 0, "input": "normalized"}}
    replace(tiny_transcoder(), metadata=said).save(run_dir)
    assert evaluate(settings_of(tmp_path, "--run", "imported"))[1]
    assert capsys.readouterr().err.count("says that it is of the model 'elsewhere/other'") == 1


def lacking(metrics: dict) -> None:
    del metrics["prefixes"][0]["relative_bias"]


def of_tomorrow(metrics: dict) -> None:
    metrics["latents"]["colour"] = "blue"


def of_another_type(metrics: dict) -> None:
    metrics["redundancy"] = [0.1]


def of_yesterday(metrics: dict) -> None:
    metrics["provenance"]["code_sha256"] = metrics["provenance"].pop("metrics_version")


VERSIONS = [lacking, of_tomorrow, of_another_type, of_yesterday]


@pytest.mark.parametrize("change", VERSIONS)
def test_metrics_of_another_version_are_one_line_or_measured_again(
    change: Callable[[dict], None], root: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "evaluation"
    folder.mkdir()
    whole = metrics_of(root) | {"files": []}
    provenance = Metrics.model_validate(whole).provenance
    values = json.loads(json.dumps(whole))
    change(values)
    (folder / "metrics.json").write_text(json.dumps(values))
    message = r"metrics\.json: field [\w.]+: .* another version; evaluate again \(make evaluate\)$"
    with pytest.raises(InputError, match=message):
        finished(folder)
    assert find(read_all(tmp_path), provenance) is None
    of_train = provenance.model_copy(update={"split": "train"})
    make_room(folder, Metrics.model_validate(whole).model_copy(update={"provenance": of_train}))
    (kept,) = (tmp_path / "evaluations").glob("*-0_tokens-*")
    assert json.loads((kept / "metrics.json").read_text()) == values


def test_an_evaluation_that_lacks_a_field_is_measured_again(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    settings = settings_of(tmp_path)
    whole, _ = evaluate(settings)
    file = settings.run_dir() / "evaluation" / "metrics.json"
    damaged = json.loads(file.read_text())
    lacking(damaged)
    file.write_text(json.dumps(damaged))
    assert listing.line_of(settings.run_dir())["evaluated"].startswith("cannot be read: field prefixes.0")
    assert evaluate(settings) == (whole, True)


@pytest.mark.parametrize("values", [{"files": 3}, {"provenance": []}, {"cross_entropy": {"skipped": {}}}])
def test_metrics_that_no_version_writes_are_one_line(values: dict, root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    folder = settings_of(tmp_path).run_dir() / "evaluation"
    (folder / "metrics.json").write_text(json.dumps(metrics_of(root) | values))
    with pytest.raises(InputError, match=r"metrics\.json: field [\w.]+: .*; remove .* to evaluate again$"):
        evaluate(settings_of(tmp_path))


@pytest.mark.parametrize("name", ["latents", "contexts"])
def test_the_document_of_outputs_names_every_tensor(root: Path, name: str) -> None:
    document = (ROOT / "docs" / "outputs.md").read_text()
    table = document[document.index(f"## evaluation/{name}.safetensors") :].split("\n\n")[2]
    named = {name for line in table.splitlines() for name in re.findall(r"`(\w+)`", line.split("|")[1])}
    with safe_open(settings_of(root).run_dir() / "evaluation" / f"{name}.safetensors", "pt") as file:
        assert set(file.keys()) == named
        assert json.loads(file.metadata()["provenance"]) == metrics_of(root)["provenance"]


LINES = [
    ("3", "expected a valid dictionary, found 3"),
    ('{"step": 1, "loss": "x"}', "loss: expected a valid number"),
    ('{"rows": 1, "loss": 2.0}', "no step"),
]


@pytest.mark.parametrize(("line", "why"), LINES)
def test_a_line_of_the_log_that_holds_something_else_is_named(line: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1, "loss": null}}\n{line}\n{{"step": 3')
    with pytest.raises(
        InputError, match=rf"metrics\.jsonl: line 2 is damaged \({why}.*\); remove that line$"
    ):
        read_lines(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": null}\n{"step": 3')
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": None}]


def test_a_run_without_heldout_rows_is_measured_on_request(tmp_path: Path) -> None:
    make_run(tmp_path, heldout=0)
    log = settings_of(tmp_path).run_dir() / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    unmeasured = [line | {f"heldout_fvu/prefix_{g}": None for g in range(len(ENDS))} for line in lines]
    log.write_text("".join(json.dumps(line) + "\n" for line in unmeasured))
    with pytest.raises(InputError, match=r"found none; harvest with a larger harvest\.heldout_fraction"):
        evaluate(settings_of(tmp_path))
    metrics, _ = evaluate(settings_of(tmp_path, "--evaluate.split", "train"))
    assert (metrics["rows"], (settings_of(tmp_path).run_dir() / "evaluation/report.html").exists()) == (
        2000,
        True,
    )


@pytest.mark.parametrize("n_latents", [1, 3])
def test_a_transcoder_that_never_fires_is_reported(n_latents: int, tmp_path: Path) -> None:
    silent = replace(random_coder(D_IN, D_OUT, (n_latents,)), thresholds=torch.tensor([1e6]))
    make_run(tmp_path, silent)
    metrics, _ = evaluate(settings_of(tmp_path))
    assert metrics["prefixes"][0]["dead_fraction"] == 1.0
    assert metrics["prefixes"][0]["l0"] == 0.0
    assert metrics["latents"]["groups"][0]["median_density"] is None


def test_constant_outputs_are_evaluated(tmp_path: Path) -> None:
    """As of an MLP that is all zeros: no variance to explain, and nothing to say of its share."""
    make_run(tmp_path, constant=True)
    metrics, _ = evaluate(settings_of(tmp_path))
    assert [prefix["fvu"] for prefix in metrics["prefixes"]] == [None] * len(ENDS)
    assert (settings_of(tmp_path).run_dir() / "evaluation/report.html").exists()


def test_an_evaluation_of_another_version_is_done_again(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    evaluate(settings_of(tmp_path))
    _, again = evaluate(settings_of(tmp_path))
    monkeypatch.setattr("evaluate.run.METRICS_VERSION", 0)
    metrics, after = evaluate(settings_of(tmp_path))
    assert (again, after, metrics["provenance"]["metrics_version"]) == (False, True, 0)


def test_a_run_of_another_harvest_says_so(root: Path) -> None:
    run_dir = settings_of(root).run_dir()
    own = Transcoder.load(run_dir)
    replace(own, metadata=own.metadata | {"harvest_fingerprint": "another"}).save(run_dir)
    assert "trained on another harvest" in command(root).stdout
    own.save(run_dir)


def test_a_run_without_a_training_record_is_evaluated_by_its_thresholds_alone(root: Path) -> None:
    imported = settings_of(root, "--run", "imported")
    gated = random_coder(D_IN, D_OUT, ENDS[-1:], per_latent=True)
    gated.save(imported.run_dir())
    metrics, _ = evaluate(imported)
    (prefix,) = metrics["prefixes"]
    assert prefix["training_selection"] is None
    assert prefix["threshold"] == pytest.approx(float(gated.thresholds.mean()))
    assert not metrics["provenance"]["trained_on_this_store"]
    assert "loss.png" not in metrics["files"]


def test_the_page_names_what_was_measured(root: Path) -> None:
    evaluate(settings_of(root))
    page = (settings_of(root).run_dir() / "evaluation" / "report.html").read_text()
    assert "1,500 rows" in page
    assert "tests/tiny" in page


def command(root: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "evaluate", "--cross-entropy-tokens", "0", *arguments(root, *more)],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_command_prints_table_verdicts_and_paths(root: Path) -> None:
    process = command(root)
    assert process.returncode == 0, process.stderr
    for text in ("threshold", "dead %", "FVU", "report.html", "layer_0.zarr", "tiny"):
        assert text in process.stdout


def test_a_missing_run_is_one_line(root: Path) -> None:
    process = command(root, "--run", "absent")
    assert process.returncode == 2
    assert process.stderr.startswith("error: ")
    assert process.stderr.count("\n") == 1
    assert "make train" in process.stderr


def test_a_store_of_other_widths_is_refused(root: Path, tmp_path: Path) -> None:
    rows = tuple(values.numpy() for values in vars(random_rows(40, 7, 5)).values())
    make_store(settings_of(root, "--harvest", "wide").store_path(0), train=rows, heldout=rows)
    with pytest.raises(InputError, match="expected widths 7 -> 5"):
        evaluate(settings_of(root, "--harvest", "wide", "--run", "tiny"))


def test_a_run_of_another_layer_is_refused_and_measured_on_purpose(root: Path) -> None:
    """With what was asked for in the record; without asking it is refused again."""
    settings, on_purpose = (settings_of(root, "--run", "other", *more) for more in ((), ALLOWED))
    random_coder(D_IN, D_OUT, ENDS, layer=3).save(settings.run_dir())
    with pytest.raises(InputError, match=r"it is of layer 3, there 0; .*--evaluate\.allow_mismatch true"):
        evaluate(settings)
    assert not (settings.run_dir() / "evaluation").exists()
    metrics, fresh = evaluate(on_purpose)
    assert fresh
    assert metrics["provenance"]["mismatch"] == ["it is of layer 3, there 0"]
    with pytest.raises(InputError, match="it is of layer 3, there 0"):
        evaluate(settings)
    process = command(root, "--run", "other", *ALLOWED)
    assert "measured where it does not belong, as asked: it is of layer 3, there 0" in process.stdout
    assert "mismatch" not in evaluate(settings_of(root))[0]["provenance"]


def test_an_interrupted_run_says_so_and_its_checkpoint_is_evaluated(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, *SMALL)
    make_run(tmp_path)
    shutil.rmtree(settings.run_dir())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(settings, Store.of(settings))
    with pytest.raises(
        InputError, match=r"interrupted, or still .* step 8 of 8; .*evaluate\.checkpoint true"
    ):
        evaluate(settings)
    (settings.run_dir() / "notes.csv").write_text("layer,latent,label\n0,3,of the run\n")
    of_checkpoint = settings_of(tmp_path, *SMALL, "--evaluate.checkpoint", "true")
    metrics, fresh = evaluate(of_checkpoint)
    assert fresh
    assert metrics["provenance"]["checkpoint"] == {"step": 8, "of": 8}
    assert "of the run" in (settings.run_dir() / "at_step_8" / "evaluation" / "report.html").read_text()
    assert not (settings.run_dir() / "evaluation").exists()
    assert not evaluate(of_checkpoint)[1]
    shown = Console(record=True, width=200, file=io.StringIO())
    show(of_checkpoint, Metrics.model_validate(metrics), False, shown)
    text = shown.export_text()
    assert "the checkpoint of step 8 of 8: training has not ended" in text
    assert "at_step_8/evaluation/report.html" in text
    train(settings, Store.of(settings))
    show(of_checkpoint, Metrics.model_validate(metrics), False, shown)
    assert "the checkpoint of step 8 of 8\n" in shown.export_text()


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["contexts.safetensors", "latents.safetensors", "report.html", "fvu.png"])
def test_a_file_that_was_cut_short_is_measured_again(
    root: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was found to be complete, and the stage that read it later failed."""
    shutil.copytree(settings_of(root).run_dir() / "evaluation", folder := tmp_path / "evaluation")
    metrics = finished(folder)
    assert metrics is not None
    assert find(read_all(tmp_path), metrics.provenance) is not None
    assert capsys.readouterr().err == ""
    file = folder / name
    file.write_bytes(file.read_bytes()[:-20])
    assert find(read_all(tmp_path), metrics.provenance) is None
    assert capsys.readouterr().err == f"{file}: damaged or incomplete: the run is measured again\n"

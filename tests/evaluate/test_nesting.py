"""A run without nesting as the baseline of one with it: only where that is all they differ in."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from common.files import sha256
from common.settings import Settings
from evaluate.nesting import one_group
from evaluate.run import evaluate
from shards import Store
from tests.evaluate.runs import ENDS, make_run, settings_of, tiny_transcoder
from transcoder import Transcoder

ROWS = 1500


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nesting")
    make_run(folder)
    return folder


@pytest.fixture(scope="module")
def evaluated(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as one group, evaluated; kept where no run is looked for."""
    settings = settings_of(root, "--run", "flat")
    save(settings, transcoder_of(root))
    evaluate(settings, ce_tokens=0)
    return Path(shutil.move(settings.run_dir(), tmp_path_factory.mktemp("kept")))


@pytest.fixture
def flat(root: Path, evaluated: Path) -> Iterator[Settings]:
    settings = settings_of(root, "--run", "flat")
    shutil.copytree(evaluated, settings.run_dir())
    yield settings
    shutil.rmtree(settings.run_dir())


def saved_and_evaluated(settings: Settings, transcoder: Transcoder) -> None:
    """As if `transcoder` had been evaluated, with the same numbers."""
    save(settings, transcoder)
    file = settings.run_dir() / "evaluation" / "metrics.json"
    metrics = json.loads(file.read_text())
    metrics["provenance"]["weights_sha256"] = sha256(settings.run_dir() / "transcoder.safetensors")
    file.write_text(json.dumps(metrics))


def transcoder_of(root: Path, change: Callable[[dict[str, Any]], object] = lambda _: None) -> Transcoder:
    own = Transcoder.load(settings_of(root).run_dir())
    metadata = json.loads(json.dumps(own.metadata))
    metadata["settings"]["transcoder"]["group_sizes"] = [ENDS[-1]]
    change(metadata)
    return Transcoder(own.parameters, own.thresholds[-1:], ENDS[-1:], metadata)


def save(settings: Settings, transcoder: Transcoder) -> None:
    settings.run_dir().mkdir(exist_ok=True)
    transcoder.save(settings.run_dir())


def baseline_of(root: Path) -> dict[str, Any] | None:
    settings = settings_of(root)
    return one_group(settings, Store.of(settings), ROWS)


def test_it_is_in_the_metrics_and_its_coming_and_going_measures_again(root: Path) -> None:
    settings, beside = settings_of(root), settings_of(root, "--run", "flat")
    metrics, _ = evaluate(settings, ce_tokens=0)
    assert metrics.baselines.one_group is None
    save(beside, transcoder_of(root))
    plain, _ = evaluate(beside, ce_tokens=0)
    assert plain.baselines.one_group is None
    metrics, fresh = evaluate(settings, ce_tokens=0)
    assert fresh
    baseline = metrics.baselines.one_group
    assert baseline
    assert baseline.run == "flat"
    assert baseline.fvu == plain.prefixes[0].fvu == metrics.prefixes[-1].fvu
    assert not evaluate(settings, ce_tokens=0)[1]
    shutil.rmtree(beside.run_dir())
    metrics, fresh = evaluate(settings, ce_tokens=0)
    assert (fresh, metrics.baselines.one_group) == (True, None)


@pytest.mark.parametrize(
    "change",
    [
        lambda metadata: metadata["settings"]["train"].update(rows=metadata["settings"]["train"]["rows"] * 2),
        lambda metadata: metadata["settings"]["train"].update(lr=0.5),
        lambda metadata: metadata["settings"]["train"].update(seed=7),
        lambda metadata: metadata["settings"]["transcoder"].update(k=1),
        lambda metadata: metadata.update(harvest_fingerprint="of another harvest"),
        lambda metadata: metadata.update(settings={}),
        lambda metadata: metadata.update(settings={"run": "of another version"}),
        lambda metadata: metadata["settings"]["transcoder"].update(group_sizes=["0.3x"], d_sae="0.3x"),
    ],
    ids=["rows", "lr", "seed", "k", "harvest", "no settings", "other settings", "sizes that do not fit"],
)
def test_whatever_else_differs_it_is_none(
    root: Path, flat: Settings, change: Callable[[dict[str, Any]], object]
) -> None:
    assert baseline_of(root) is not None
    saved_and_evaluated(flat, transcoder_of(root, change))
    assert baseline_of(root) is None


def test_how_often_it_was_logged_may_differ(root: Path, flat: Settings) -> None:
    change = transcoder_of(root, lambda metadata: metadata["settings"]["train"].update(log_every=3))
    saved_and_evaluated(flat, change)
    assert baseline_of(root) is not None


def test_an_evaluation_of_older_weights_is_none(root: Path, flat: Settings) -> None:
    other = tiny_transcoder(seed=5)
    own = transcoder_of(root)
    save(flat, Transcoder(other.parameters, own.thresholds, own.prefix_ends, own.metadata))
    assert baseline_of(root) is None


def test_a_damaged_sibling_is_told_and_stops_nothing(
    root: Path, flat: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    (flat.run_dir() / "evaluation" / "metrics.json").write_text("{")
    assert baseline_of(root) is None
    line = capsys.readouterr().err
    assert line.startswith("not a baseline: ")
    assert "metrics.json: cannot be read" in line

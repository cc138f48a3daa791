"""A run's evaluations live beside each other: none takes another's place, and the main one stays the held-out one."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from common.settings import Settings
from evaluate.__main__ import show
from evaluate.files import finished
from evaluate.kept.evaluations import beside, beside_a_larger, evaluation_on, main_evaluation, read_all
from evaluate.labels.effects import Chance, LogitEffects
from evaluate.metrics.language import Language, measure_language
from evaluate.records import AblationLosses, LanguageMetrics, Metrics
from evaluate.report.sides import START, lines, median_density, moved, sides
from evaluate.run import evaluate, prepare
from shards import Store
from tests.evaluate.runs import D_IN, D_OUT, make_run, settings_of, tiny_transcoder
from tests.fixtures import make_store
from transcoder import Transcoder
from transcoder.weights import FILE_NAME, read_metadata

TRAIN = ("--evaluate.split", "train")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny run; no plots are drawn, which would be nine tenths of the time."""
    monkeypatch.setattr("evaluate.run.draw", lambda *_: [])
    make_run(tmp_path)
    return tmp_path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each time that the language model was asked; without it one is not to be had."""
    tokens: list[int] = []

    def said(settings: Settings, store: Store, split: object, coder: object, n_tokens: int) -> Language:
        tokens.append(n_tokens)
        losses = AblationLosses(skipped=None, contexts=2, positions=4, clean=1.0, zero=9.0, mean=9.0)
        prefixes = [
            LanguageMetrics(
                cross_entropy=1 + ce,
                increase=ce,
                increase_error=0.5,
                kl=ce,
                recovered_zero=1 - ce / 8,
                recovered_mean=None,
            )
            for ce in (4.0, 2.0, 1.0)
        ]
        ids, by = np.arange(48, dtype=np.int32).reshape(24, 2), np.ones((24, 2), np.float32)
        rest = (np.ones((24, 4), np.int32), np.array([[-1.0, 1.0]] * 24, np.float32), np.ones(24, np.float32))
        effects = LogitEffects(ids, by, ids + 1, -by, *rest, 5, Chance(0.5, 0.01))
        return Language(losses, prefixes, effects, {"clean": np.array([1.0, 1.0]), "0": np.array([4.5, 5.5])})

    def measured(
        settings: Settings, store: Store, split: object, coder: object, n_tokens: int, _: object
    ) -> Language:
        if n_tokens:
            return said(settings, store, split, coder, n_tokens)
        return measure_language(settings, store, split, coder, 0)  # type: ignore[arg-type]

    monkeypatch.setattr("evaluate.run.measure_language", measured)
    return tokens


def contents(folder: Path, *without: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in without}


def other_text(root: Path, rows: int = 900) -> None:
    """Another harvest of the layer, of rows twice as large: more latents fire."""
    rng = np.random.default_rng(5)

    def some(n: int) -> tuple[np.ndarray, np.ndarray]:
        return 2 * rng.standard_normal((n, D_IN), np.float32), rng.standard_normal((n, D_OUT), np.float32)

    make_store(settings_of(root, "--harvest", "other").store_path(0), some(1000), some(rows))


def test_held_out_train_and_another_text_beside_each_other(root: Path) -> None:
    run_dir = settings_of(root).run_dir()
    heldout, _ = evaluate(settings_of(root), 0)
    before = contents(run_dir / "evaluation", "report.html")
    train, fresh = evaluate(settings_of(root, *TRAIN), 0)
    assert (fresh, train.rows, train.provenance.split) == (True, 2000, "train")
    other_text(root)
    other, _ = evaluate(settings_of(root, "--harvest", "other"), 0)
    fewer, _ = evaluate(settings_of(root, "--evaluate.rows", "700"), 0)
    assert contents(run_dir / "evaluation", "report.html") == before
    assert finished(run_dir / "evaluation") == heldout
    beside = {path.name[:16] for path in (run_dir / "evaluations").iterdir()}
    assert beside == {"train-2000_rows-", "heldout-900_rows", "heldout-700_rows"}
    there = read_all(run_dir)  # in W&B only the quick look has its size in its names
    assert [beside_a_larger(there, each) for each in (heldout, train, other, fewer)] == [
        None,
        None,
        None,
        (700, 0),
    ]
    for metrics, more in ((heldout, ()), (train, TRAIN), (other, ("--harvest", "other"))):
        assert evaluate(settings_of(root, *more), 0) == (metrics, False)
    assert evaluate(settings_of(root, "--evaluate.rows", "700"), 0) == (fewer, False)
    digest = heldout.provenance.weights_sha256
    shown = sides(read_all(run_dir), digest)
    assert [side.name for side in shown] == ["held-out", f"{other.provenance.dataset}, held-out", "train"]
    fvu = next(line for line in lines(shown) if line.name == "FVU")
    first, last = heldout.prefixes[0].fvu, train.prefixes[0].fvu
    assert first is not None
    assert last is not None
    assert (fvu.g, fvu.cells[0]) == (0, (f"{first:.3f}", None))
    assert fvu.cells[2] == (f"{last:.3f}", f"{last - first:+.3f}")
    for side in shown:
        page = (side.evaluation.folder / "report.html").read_text()
        assert page.count(START.decode()) == 1
        assert f"{last:.3f} <small>({last - first:+.3f})</small>" in page
    console = Console(record=True, width=120, file=io.StringIO())
    show(settings_of(root, *TRAIN), train, False, console)
    printed = console.export_text()
    assert f"{shown[2].evaluation.folder}/report.html" in printed
    assert "the same weights on other rows" in printed
    for of in (train, other):
        place = evaluation_on(run_dir, digest, of.provenance.store_fingerprint, of.provenance.split)
        assert finished(place) == of
    shutil.rmtree(place)
    evaluate(settings_of(root), 0)
    assert "tests/tiny" in (page := (run_dir / "evaluation/report.html").read_text())
    assert f"{other.provenance.dataset}, held-out" not in page


def test_a_page_of_older_weights_shows_nothing_that_is_gone(root: Path) -> None:
    run_dir = settings_of(root).run_dir()
    for more in ((), TRAIN):
        evaluate(settings_of(root, *more), 0)
    page = run_dir / "evaluation/report.html"
    assert '<table class="numbers" id="sides">' in page.read_text()
    metadata = Transcoder.load(run_dir).metadata
    replace(tiny_transcoder(seed=3), metadata=metadata).save(run_dir)
    evaluate(settings_of(root, *TRAIN), 0)
    assert '<table class="numbers" id="sides">' not in page.read_text()


def test_a_note_is_shown_in_the_pages_of_all_evaluations(root: Path) -> None:
    run_dir = settings_of(root).run_dir()
    evaluate(settings_of(root), 0)
    (run_dir / "notes.csv").write_text("layer,latent,label\n0,3,said once\n")
    train = settings_of(root, *TRAIN)
    evaluate(train, 0)
    pages = [folder / "report.html" for folder, _ in read_all(run_dir)]
    assert [b"said once" in page.read_bytes() for page in pages] == [True, True]
    (run_dir / "notes.csv").write_text("layer,latent,label\n0,3,said anew\n")
    assert not evaluate(train, 0)[1]
    assert [b"said anew" in page.read_bytes() for page in pages] == [True, True]


def test_fewer_rows_first_give_the_place_to_all_of_them(root: Path) -> None:
    run_dir = settings_of(root).run_dir()
    few, _ = evaluate(settings_of(root, "--evaluate.rows", "700"), 0)
    assert finished(run_dir / "evaluation") == few
    whole, _ = evaluate(settings_of(root), 0)
    assert finished(run_dir / "evaluation") == whole
    (kept,) = (run_dir / "evaluations").iterdir()
    assert finished(kept) == few


def test_cross_entropy_is_kept_and_the_language_model_not_asked_again(root: Path, asked: list[int]) -> None:
    """By an evaluation without it, of other rows, or measured again for another reason; other tokens are asked for."""
    settings, run_dir = settings_of(root), settings_of(root).run_dir()
    plain, _ = evaluate(settings, 0)
    assert plain.prefixes[0].cross_entropy is None
    full, fresh = evaluate(settings, 64)
    assert (fresh, asked) == (True, [64])
    assert not (run_dir / "evaluations").exists(), "the one without says nothing that this one does not"
    assert evaluate(settings, 0) == (full, False)
    fewer, _ = evaluate(settings_of(root, "--evaluate.rows", "700"), 0)
    assert fewer.prefixes[1].cross_entropy == full.prefixes[1].cross_entropy
    (run_dir / "evaluation/contexts.safetensors").unlink()
    again, fresh = evaluate(settings, 0)
    assert (fresh, again, asked) == (True, full, [64])
    assert contents(run_dir / "evaluation")["language.safetensors"]
    evaluate(settings_of(root, *TRAIN), 64)
    assert asked == [64, 64]
    evaluate(settings, 32)
    assert asked == [64, 64, 32]
    assert finished(run_dir / "evaluation") == full, "more tokens stay the main one"
    assert evaluate(settings, 64) == (full, False)


def test_what_another_stage_left_beside_an_evaluation_moves_with_it(root: Path, asked: list[int]) -> None:
    """Probes of train rows: where an evaluation on them would be, then beside it, and beside the one that follows."""
    settings, run_dir = settings_of(root, *TRAIN), settings_of(root).run_dir()
    of = prepare(settings, 0).provenance
    first = beside(run_dir, of, own=False)
    assert first.parent == run_dir / "evaluations"
    assert beside(run_dir, of, own=True) == run_dir / "evaluation"
    evaluate(settings, 0)
    assert beside(run_dir, of, own=False) == first
    (first / "probes.json").write_text("{}")
    evaluate(settings, 64)
    assert not first.exists(), "the one with the cross-entropy says all of it"
    assert (beside(run_dir, of, own=False) / "probes.json").read_text() == "{}"


def test_a_language_model_that_could_not_be_had_is_asked_again(
    root: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from evaluate.metrics.language import measure_language

    with monkeypatch.context() as patch:
        patch.setattr("evaluate.run.measure_language", measure_language)
        metrics, _ = evaluate(settings_of(root), 64)
        assert metrics.cross_entropy.skipped
        assert evaluate(settings_of(root), 64) == (metrics, False)
    metrics, fresh = evaluate(settings_of(root), 64)
    assert (fresh, metrics.cross_entropy.skipped, asked) == (True, None, [64])


def test_baselines_come_back_with_the_train_rows(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = evaluate(settings_of(root), 0)
    shutil.rmtree(settings_of(root).run_dir() / "evaluation")
    with monkeypatch.context() as patch:
        patch.setattr("evaluate.run.fit_ridge", lambda split: pytest.fail("its rows were removed"))
        patch.setattr("evaluate.run.Store.of", removed(Store.of))
        without, _ = evaluate(settings_of(root), 0)
        assert without.baselines.linear is None
        assert evaluate(settings_of(root), 0) == (without, False)
    assert evaluate(settings_of(root), 0) == (whole, True)


def removed(of: object) -> object:
    def opened(settings: Settings) -> Store:
        store = of(settings)  # type: ignore[operator]
        store.train.removed = True
        return store

    return opened


def test_the_main_one_is_of_the_runs_own_store(root: Path) -> None:
    """Trained elsewhere: never. Not known: of the harvest without a name. Readers take what there is."""
    run_dir, file = settings_of(root).run_dir(), settings_of(root).run_dir() / FILE_NAME
    other_text(root)
    metadata = read_metadata(run_dir)
    assert metadata["harvest_fingerprint"]
    metrics, _ = evaluate(settings_of(root, "--harvest", "other"), 0)
    assert not (run_dir / "evaluation").exists()
    assert main_evaluation(run_dir, metrics.provenance.weights_sha256).parent.name == "evaluations"
    assert main_evaluation(run_dir, "other weights") == run_dir / "evaluation"

    own = Transcoder.load(run_dir)
    replace(
        own, metadata={key: each for key, each in own.metadata.items() if key != "harvest_fingerprint"}
    ).save(run_dir)
    assert file.is_file()
    evaluate(settings_of(root, "--harvest", "other"), 0)
    assert not (run_dir / "evaluation").exists()
    metrics, _ = evaluate(settings_of(root), 0)
    assert metrics.provenance.trained_on_this_store is None
    assert finished(run_dir / "evaluation") == metrics


def test_an_evaluation_of_version_2_is_measured_again_with_a_line(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of train rows that stood in the main place too."""
    run_dir = settings_of(root).run_dir()
    evaluate(settings_of(root, *TRAIN), 0)
    (train,) = (run_dir / "evaluations").iterdir()
    values = json.loads((train / "metrics.json").read_text())
    values["provenance"]["metrics_version"] = 2
    (train / "metrics.json").write_text(json.dumps(values))
    train.replace(run_dir / "evaluation")
    capsys.readouterr()
    metrics, fresh = evaluate(settings_of(root), 0)
    assert fresh
    assert f"{run_dir}/evaluation is kept in" in capsys.readouterr().err
    assert finished(run_dir / "evaluation") == metrics
    _, fresh = evaluate(settings_of(root, *TRAIN), 0)
    assert fresh
    assert "of version 2 of the evaluation, this is 3: measured again" in capsys.readouterr().err


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", range(3))
def test_a_kill_leaves_none_that_looks_whole_and_is_not(
    at: int, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before the move of the one that was there, before the page is there, and before metrics.json."""
    run_dir, calls = settings_of(root).run_dir(), [0]
    few, _ = evaluate(settings_of(root, "--evaluate.rows", "700"), 0)
    rename, unlink = Path.replace, Path.unlink

    def renamed(self: Path, target: Path) -> Path:
        if calls[0] == at:
            raise Killed
        calls[0] += 1
        return rename(self, target)

    def unlinked(self: Path, missing_ok: bool = False) -> None:
        if self.suffix != ".tmp":  # a killed process removes nothing
            unlink(self, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", renamed)
        patch.setattr(Path, "unlink", unlinked)
        with pytest.raises(Killed):
            evaluate(settings_of(root), 0)
    for folder, values in read_all(run_dir):
        metrics = Metrics.model_validate(values)
        assert metrics == few
        assert all((folder / name).is_file() for name in metrics.files)
    whole, fresh = evaluate(settings_of(root), 0)
    assert fresh
    assert finished(run_dir / "evaluation") == whole
    assert evaluate(settings_of(root, "--evaluate.rows", "700"), 0) == (few, False)
    assert not [*run_dir.rglob("*.tmp")]


def test_how_many_latents_moved_by_hand() -> None:
    """Of four with enough firings one doubled, one halved and one did not move; one has too few to tell."""
    before = np.array([0.1, 0.1, 0.1, 0.001, 0.0])
    after = np.array([0.2, 0.05, 0.15, 0.1, 0.0])
    assert moved(before, after, 1000, 1000) == 0.75
    assert moved(before, after, 1000, 400) == pytest.approx(2 / 3), "0.001 and 0.1: 11 of 400 expected"
    assert moved(before, after, 10, 10) is None
    assert median_density(np.array([0.0, 0.25, 0.75])) == 50.0
    assert median_density(np.zeros(3)) is None

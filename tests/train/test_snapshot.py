"""A run that was stopped: what is said of it, and its newest checkpoint as a transcoder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from common.errors import InputError
from common.settings import Settings
from shards import Store
from tests.fixtures import make_store
from tests.train.runs import sparse_rows, tensors
from train import checkpoint, record, samples_page
from train.loop import Run, train
from train.measure import measure
from train.snapshot import snapshot
from transcoder import Transcoder
from transcoder.heavy import Typical

Make = Callable[..., Settings]
CPU = torch.device("cpu")


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """stop_at(n): a training is interrupted as Ctrl-C does, after its n-th step."""

    def at(steps: int) -> None:
        feed = Run.feed

        def feeding(run: Run, *arguments: object) -> None:
            feed(run, *arguments)  # pyright: ignore[reportArgumentType]
            if run.state.step == steps:
                run.save()
                raise KeyboardInterrupt

        monkeypatch.setattr(Run, "feed", feeding)

    return at


def stopped(settings: Settings, store: Store, stop_at: Callable[[int], None], step: int) -> Path:
    stop_at(step)
    with pytest.raises(KeyboardInterrupt):
        train(settings, store)
    return settings.run_dir()


def test_the_checkpoint_is_the_transcoder_that_training_had(
    make_settings: Make, store: Store, stop_at: Callable[[int], None]
) -> None:
    """L0 on the train rows is training's k, and the held-out error is what the log says of that step."""
    run_dir = stopped(make_settings(), store, stop_at, 80)
    folder = snapshot(run_dir, store, CPU)
    assert folder == run_dir / "at_step_80"
    transcoder = Transcoder.load(folder)
    assert transcoder.metadata["checkpoint"] == {"step": 80, "of": 96}
    assert transcoder.metadata["training"]["steps"] == 80
    assert transcoder.metadata["harvest_fingerprint"] == store.manifest.fingerprint
    rows = [store.train.rows(start, start + 1024) for start in range(0, 4096, 1024)]
    every = Typical(torch.zeros(transcoder.d_out), limit=torch.inf, variance=1.0)
    measured = measure(transcoder, rows, lambda _: transcoder.thresholds, every)
    assert measured.l0[-1] == pytest.approx(4, rel=0.02)
    logged = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    probed = [logged[f"heldout_fvu/prefix_{g}"] for g in range(3)]
    assert logged["step"] == 80
    assert transcoder.metadata["heldout"]["fvu"] == pytest.approx(probed, rel=0.02)
    assert probed[-1] < 0.9
    assert measured.l0 == pytest.approx(transcoder.metadata["training"]["l0"], rel=0.02)
    assert not (run_dir / "transcoder.safetensors").exists()
    (run_dir / "state/step_80/tensors.safetensors").unlink()  # what is written is not made again
    assert snapshot(run_dir, store, CPU) == folder


@pytest.mark.parametrize("selection", ["topk", "batch_topk"])
def test_any_selection_and_a_first_checkpoint(
    make_settings: Make, store: Store, stop_at: Callable[[int], None], selection: str
) -> None:
    settings = make_settings(transcoder__selection=selection, transcoder__skip=True, train__sample_every=0)
    transcoder = Transcoder.load(snapshot(stopped(settings, store, stop_at, 1), store, CPU))
    assert transcoder.metadata["training"]["l0"][-1] == pytest.approx(4, rel=0.02)


def test_the_checkpoint_of_the_last_step_is_the_finished_run(
    finished: Path, store: Store, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "a")
    again = snapshot(tmp_path / "a", store, CPU)
    own, actual = tensors(finished), tensors(again)
    assert own.keys() == actual.keys()
    assert all(torch.equal(own[name], actual[name]) for name in own)


def test_a_run_that_was_stopped_says_so_and_where(
    make_settings: Make, store: Store, stop_at: Callable[[int], None]
) -> None:
    settings = make_settings()
    run_dir = stopped(settings, store, stop_at, 60)
    assert record.stopped(run_dir) == "interrupted, or still training, at step 60 of 96"
    with pytest.raises(InputError, match=r"interrupted, or still training; .*--evaluate\.checkpoint true"):
        Transcoder.load(run_dir)
    with pytest.raises(InputError, match=r"at step 60 of 96; its samples are written when it ends"):
        next(samples_page.read(run_dir))
    shutil.rmtree(run_dir / "state")
    assert record.stopped(run_dir) == "interrupted, or still training, before its first checkpoint of 96"
    with pytest.raises(InputError, match="has no checkpoint yet"):
        snapshot(run_dir, store, CPU)
    with pytest.raises(InputError, match="no run was started here"):
        snapshot(run_dir.with_name("absent"), store, CPU)


def test_a_finished_run_is_not_stopped_until_it_goes_on(
    make_settings: Make, store: Store, stop_at: Callable[[int], None]
) -> None:
    settings = make_settings(train__rows=64 * 8)
    train(settings, store)
    assert record.stopped(settings.run_dir()) is None
    assert record.went_on(settings.run_dir()) is None
    stopped(make_settings(train__rows=64 * 20), store, stop_at, 12)
    assert record.stopped(settings.run_dir()) is None  # the weights of step 8 are there
    assert record.went_on(settings.run_dir()) == 12
    assert Transcoder.load(snapshot(settings.run_dir(), store, CPU)).metadata["checkpoint"] == {
        "step": 12,
        "of": 20,
    }


def test_a_checkpoint_of_another_store_is_refused(
    make_settings: Make, store: Store, stop_at: Callable[[int], None], tmp_path: Path
) -> None:
    run_dir = stopped(make_settings(), store, stop_at, 20)
    other = make_store(tmp_path / "other.zarr", sparse_rows(2048, 5), sparse_rows(1024, 6), seed=1)
    with pytest.raises(InputError, match=r"trained on harvest .* a checkpoint is evaluated on the store"):
        snapshot(run_dir, other, CPU)


def test_a_training_that_takes_the_checkpoint_away_meanwhile(
    make_settings: Make, store: Store, stop_at: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one is read; one that is damaged and stays is refused."""
    run_dir = stopped(make_settings(), store, stop_at, 20)
    restore, folder = checkpoint.restore, run_dir / "state" / "step_20"

    def while_training_goes_on(*arguments: object) -> bool:
        if folder.exists():
            (run_dir / "state" / "latest").write_text("step_21\n")
            folder.rename(run_dir / "state" / "step_21")
            raise InputError("not a readable checkpoint")
        return restore(*arguments)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(checkpoint, "restore", while_training_goes_on)
    assert snapshot(run_dir, store, CPU).name == "at_step_20"
    shutil.rmtree(run_dir / "at_step_20")
    (run_dir / "state" / "step_21" / "state.json").write_text(json.dumps({"version": 9}))
    with pytest.raises(InputError, match="expected checkpoint version 5, found 9"):
        snapshot(run_dir, store, CPU)

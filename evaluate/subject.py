"""What is evaluated: any transcoder, fed as a store's rows are."""

from pathlib import Path

from common.device import pick_device
from common.errors import InputError
from common.settings import Settings
from shards import Store
from train import record
from train.snapshot import snapshot
from transcoder import Transcoder
from transcoder.gain import bind
from transcoder.weights import FILE_NAME


def run_of(settings: Settings, store: Store) -> Path:
    """Directory of the transcoder that is evaluated: the run's own, or on request that of its newest checkpoint.

    Raises `InputError` where it has no weights, saying how far it is.
    """
    run_dir = settings.run_dir()
    if settings.evaluate.checkpoint:
        return snapshot(run_dir, store, pick_device(settings.model.device))
    refuse_missing(run_dir)
    return run_dir


def checkpoint_note(run_dir: Path, step: int, steps: int) -> str:
    """One line of a checkpoint that is evaluated in place of a run's finished weights."""
    finished = (run_dir / FILE_NAME).exists() and record.went_on(run_dir) is None
    return f"the checkpoint of step {step:,} of {steps:,}{'' if finished else ': training has not ended'}"


def refuse_missing(run_dir: Path) -> None:
    """Raise `InputError` where a run has no finished weights: how far it is, or which others there are."""
    if (run_dir / FILE_NAME).exists():
        return
    record.refuse_unfinished(run_dir)
    others = sorted(path.parent.name for path in run_dir.parent.glob(f"*/{FILE_NAME}"))
    instead = f", or evaluate one of those there are: RUN={' '.join(others)}" if others else ""
    raise InputError(f"{run_dir / FILE_NAME}: not found; train this run first (make train){instead}")


def read(path: str | Path, store: Store, mismatch: bool = False) -> Transcoder:
    """The transcoder at `path` (see `Transcoder.load`), bound to the store: see `transcoder.gain.bind`.

    Raises `InputError` naming the file, what was expected and what was found.
    """
    return bind(Transcoder.load(path), store, str(path), mismatch)

"""Resumable state below the run directory: state/step_N/{tensors.safetensors, state.json}, state/latest.

A checkpoint is written aside, flushed and renamed; then `latest` names it; then older ones go.
So a process killed at any instant leaves a whole checkpoint behind, the last one or the one before.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from common.errors import InputError, first_line
from common.files import whole_folder, write_whole
from train.log import log_lines
from train.record import afresh, latest
from train.state import State
from transcoder.weights import CHECKPOINT, save_tensors

VERSION = 5
"""1: one scale of the rows with their mean. 2: one learning rate for all. 3: k active latents from the first step.
4: all rows weighed the same."""


def save(run_dir: Path, state: State) -> None:
    """Make the state's checkpoint the newest and only one; nothing to do where that step has one already."""
    folder = run_dir / "state"
    final = folder / f"step_{state.step}"
    if final.exists():
        return  # Ctrl-C right after a regular checkpoint
    with whole_folder(final) as aside:
        save_tensors(aside / "tensors.safetensors", state.tensors())
        text = json.dumps({"version": VERSION, **state.scalars()}, indent=1)
        write_whole(aside / "state.json", text.encode())
    write_whole(run_dir / CHECKPOINT, f"{final.name}\n".encode())
    for old in folder.iterdir():
        if old.is_dir() and old != final:
            shutil.rmtree(old)


def restore(run_dir: Path, state: State) -> bool:
    """Bring `state` to the newest checkpoint; False when there is none.

    Raises `InputError` when the checkpoint is damaged or of another version.
    """
    folder = latest(run_dir)
    if folder is None:
        return False
    try:
        scalars: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        version = scalars.pop("version", None)
        if version != VERSION:
            raise InputError(
                f"{folder}: expected checkpoint version {VERSION}, found {version}; {afresh(run_dir)}"
            )
        state.restore(load_file(folder / "tensors.safetensors"), scalars)
    except InputError:
        raise
    except (OSError, ValueError, TypeError, AttributeError, SafetensorError) as error:
        what = f"not a readable checkpoint: {first_line(error)}"
        raise InputError(f"{folder}: {what}; {afresh(run_dir)}") from error
    return True


def cut_metrics(run_dir: Path, step: int) -> None:
    """Drop lines of metrics.jsonl after `step`, and a last line that a kill left unfinished."""
    file = run_dir / "metrics.jsonl"
    if not file.exists():
        return
    kept = [text for text, values in log_lines(file) if text.endswith("\n") and (values["step"] or 0) <= step]
    write_whole(file, "".join(kept).encode())

"""Resumable state below the run directory: state/step_N/{tensors.safetensors, state.json}, state/latest.

A checkpoint is written aside, flushed and renamed; then `latest` names it; then older ones are removed.
So a process killed at any instant leaves a whole checkpoint behind, the last one or the one before.

If several processes share the latents, each writes its slice into tensors-<first>-<end>.safetensors, all at the same
time; state.json, written when all files are there, lists them. Any number of processes can continue from either form.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.errors import InputError, first_line, shown
from common.files import aside_of, flush, whole_folder, write_whole
from common.mesh import ONE, Mesh
from train.log import log_lines
from train.record import afresh, latest
from train.state import COUNTS, SHARED, State
from transcoder.weights import CHECKPOINT, save_tensors

Slices = Sequence[tuple[int, int]]
"""The latents [first, end) of each file of a checkpoint."""
VERSION = 5
"""1: one scale of the rows with their mean. 2: one learning rate for all. 3: k active latents from the first step.
4: all rows weighed the same."""


def save(run_dir: Path, state: State, latents: slice, mesh: Mesh = ONE) -> None:
    """Write the state's checkpoint and remove older ones; does nothing if this step has a checkpoint already.

    All processes of the `mesh` call it; `latents`: those that this process holds.
    """
    final, holders = run_dir / "state" / f"step_{state.step}", mesh.latents
    if not mesh.rows.leads or holders.any(final.exists()):
        return  # Ctrl-C right after a regular checkpoint
    own = torch.tensor([latents.start, latents.stop], device=holders.device)
    slices = [tuple(pair) for pair in holders.stacked(own).tolist()]
    if not holders.leads:
        holders.wait()  # until the folder is there
        file = aside_of(final) / _file(slices, holders.rank)
        tensors = {name: each for name, each in state.tensors().items() if not name.endswith(SHARED)}

        def write() -> None:
            save_tensors(file, tensors, _said(slices, holders.rank, state.step))
            flush(file)

        holders.together(write)
        return
    with whole_folder(final) as aside:
        holders.wait()
        own_file, said = aside / _file(slices, 0), _said(slices, 0, state.step)
        holders.together(lambda: save_tensors(own_file, state.tensors(), said))
        record = {"version": VERSION, **state.scalars()} | ({"slices": slices} if len(slices) > 1 else {})
        write_whole(aside / "state.json", json.dumps(record, indent=1).encode())
    write_whole(run_dir / CHECKPOINT, f"{final.name}\n".encode())
    for old in final.parent.iterdir():
        if old.is_dir() and old != final:
            shutil.rmtree(old)


def _file(slices: Slices, number: int) -> str:
    """Name of file `number` of the list, which has the latents [first, end)."""
    first, end = slices[number]
    return "tensors.safetensors" if len(slices) == 1 else f"tensors-{first}-{end}.safetensors"


def _said(slices: Slices, number: int, step: int) -> dict[str, str] | None:
    """The metadata that tell one file of a checkpoint from another; None if it is the only file."""
    first, end = slices[number]
    return None if len(slices) == 1 else {"latents": f"{first}-{end}", "step": f"{step}"}


def restore(run_dir: Path, state: State, latents: slice, d_sae: int) -> bool:
    """Load the newest checkpoint into `state`, which holds these `latents` of `d_sae`; False when there is none.

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
        slices = [(first, end) for first, end in scalars.pop("slices", [(0, d_sae)])]
        _check_counts(scalars, slices)
        ends = [0, *(end for _, end in slices)]
        if [first for first, _ in slices] != ends[:-1] or ends[-1] != d_sae:
            raise ValueError(f"slices: expected 0 to {d_sae} without a gap, found {slices}")
        state.restore(_read(folder, slices, latents, scalars["step"]), scalars)
    except InputError:
        raise
    except (OSError, ValueError, TypeError, AttributeError, SafetensorError) as error:
        what = f"not a readable checkpoint: {first_line(error)}"
        raise InputError(f"{folder}: {what}; {afresh(run_dir)}") from error
    return True


def _check_counts(scalars: dict[str, Any], slices: Sequence[tuple[Any, Any]]) -> None:
    """Raise `ValueError` for a count in state.json that is not a whole number from 0."""
    counts = {name: scalars.get(name) for name in COUNTS}
    counts |= {f"slices[{i}]": number for i, pair in enumerate(slices) for number in pair}
    for name, number in counts.items():
        if type(number) is not int or not 0 <= number < 2**63:
            raise ValueError(f"{name}: expected a whole number from 0, found {shown(number)}")


def _read(folder: Path, slices: Slices, latents: slice, step: int) -> dict[str, Tensor]:
    """All tensors; of those with a row for each latent only these `latents` are read. `slices`: those of the files."""
    tensors: dict[str, Tensor] = {}
    parts: dict[str, list[Tensor]] = {}
    for number, (first, end) in enumerate(slices):
        rows = slice(max(latents.start, first) - first, min(latents.stop, end) - first)
        with safe_open(folder / _file(slices, number), framework="pt") as file:
            if (said := file.metadata()) != (expected := _said(slices, number, step)):
                raise ValueError(f"{_file(slices, number)}: expected {expected}, found {said}")
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                if name.endswith(SHARED):
                    tensors[name] = file.get_tensor(name)
                elif rows.start < rows.stop:
                    stored = file.get_slice(name)
                    if (found := stored.get_shape()[0]) != end - first:
                        raise ValueError(f"tensor {name}: expected {end - first} latents, found {found}")
                    parts.setdefault(name, []).append(stored[rows])
    whole = {name: each[0] if len(each) == 1 else torch.cat(each) for name, each in parts.items()}
    return tensors | whole


def cut_metrics(run_dir: Path, step: int) -> None:
    """Drop lines of metrics.jsonl after `step`, and a last line that a kill left unfinished."""
    file = run_dir / "metrics.jsonl"
    if not file.exists():
        return
    kept = [text for text, values in log_lines(file) if text.endswith("\n") and (values["step"] or 0) <= step]
    write_whole(file, "".join(kept).encode())

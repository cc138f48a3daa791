"""How much memory training takes, before it starts. Arithmetic, checked against measured peaks in a test."""

from pathlib import Path

import torch

from common import container
from common.errors import InputError
from train.activation_samples import PER_LATENT
from train.step.losses import Objective

CPU = torch.device("cpu")
GIB = 2**30
PROGRAM = GIB // 2
"""Interpreter, PyTorch, zarr, tokenizer."""
LOADER = int(0.4 * GIB)
"""Its bound, see shards/loader.py."""


def kept(objective: Objective, d_in: int, d_out: int, *, skip: bool = False, samples: bool = False) -> int:
    """Bytes of one run's state: weights and Adam's two moments, counters, samples."""
    parameters = objective.d_sae * (d_in + d_out + 1) + d_out + (d_in * d_out if skip else 0)
    return 3 * 4 * parameters + 12 * objective.d_sae + (12 * PER_LATENT * objective.d_sae if samples else 0)


def passing(objective: Objective, d_in: int, d_out: int, batch: int, device: torch.device = CPU) -> int:
    """Bytes that a step or a measurement takes on top, once for all runs of a sweep.

    A step: pre-activations and their flags [B, F], S and its blocks [B, G, D], rows in both spaces,
    about six numbers of 8 bytes for each of 1.25 K*B candidates; in bfloat16 a copy of W_enc.
    On a GPU also the gradients of all latents, and in the precision of the products the activations, their gradient,
    and both matrices.
    A measurement: W_enc folded to raw activations.
    """
    groups, d_sae = len(objective.prefix_ends), objective.d_sae
    wide = batch * d_sae * (4 + 1) + batch * groups * d_out * 4 + 4 * batch * (d_in + d_out) * 4
    step = wide + int(1.25 * objective.k * batch) * 48
    low = 2 if objective.precision == "bfloat16" else 4
    if device.type == "cuda":
        step += d_sae * (d_in + d_out) * 4 + 2 * batch * d_sae * low
    if low == 2:
        step += d_sae * (d_in + (d_out if device.type == "cuda" else 0)) * low
    return step + 4 * d_sae * d_in


def available(device: torch.device) -> int | None:
    """Bytes that are free for this process, the machine's or its container's; none where that cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    lines = meminfo.read_text(encoding="utf-8").splitlines()
    free = int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
    left = container.memory_left()
    return free if left is None else min(free, left)


def check(state: int, on_top: int, device: torch.device) -> None:
    """Raise `InputError` when the runs cannot fit, `state` bytes of all runs and `on_top` of one step.

    On a GPU these are its memory's; the loader and the program are the host's anywhere.
    """
    parts = f"{state / GIB:.1f} of weights and Adam, {on_top / GIB:.1f} of a step"
    if device.type == "cpu":
        needs = [(CPU, state + on_top + PROGRAM + LOADER, f"{parts}, the rest loader and program")]
    else:
        needs = [(device, state + on_top, parts), (CPU, PROGRAM + LOADER, "loader and program")]
    for place, needed, what in needs:
        free = available(place)
        if free is not None and needed > free:
            where = "" if device.type == "cpu" else f" on {place}"
            raise InputError(
                f"memory: training needs about {needed / GIB:.1f} GiB{where} ({what}), {free / GIB:.1f} GiB are free; "
                "lower transcoder.d_sae or train.batch_size, or sweep fewer runs at a time"
            )

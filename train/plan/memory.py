"""How much memory training takes, before it starts. Arithmetic, checked against measured peaks in a test."""

from pathlib import Path

import torch

from common import container
from common.errors import InputError
from common.nodes.environment import here
from train.activation_samples import PER_LATENT
from train.step.gradients import PARTS
from train.step.losses import Objective
from train.step.schedule import DENSER

CPU = torch.device("cpu")
GIB = 2**30
PROGRAM = GIB // 2
"""Interpreter, PyTorch, zarr, tokenizer."""
LOADER = int(0.4 * GIB)
"""The loader's bound, see shards/loader.py."""


def kept(objective: Objective, d_in: int, d_out: int, *, skip: bool = False, samples: bool = False) -> int:
    """Bytes of one run's state: weights and Adam's two moments, counters, samples."""
    parameters = objective.d_sae * (d_in + d_out + 1) + d_out + (d_in * d_out if skip else 0)
    return 3 * 4 * parameters + 12 * objective.d_sae + (12 * PER_LATENT * objective.d_sae if samples else 0)


def passing(
    objective: Objective, d_in: int, d_out: int, batch: int, device: torch.device = CPU, processes: int = 1
) -> int:
    """Bytes that a step or a measurement takes beyond `kept`, once for all runs of a sweep.

    A step: pre-activations and their flags [B, F], S and its blocks [B, G, D], rows in both spaces,
    about six numbers of 8 bytes for each of 1.25 K*B candidates, K at its highest; in bfloat16 a copy of W_enc.
    On a GPU also the gradients of all latents. Its matrix step has a second array of flags, the gradient of the
    activations and its parts, every prefix's error, and one product of the decoder's size; in bfloat16 copies of the
    activations and both matrices. With several processes also the sums of all gradients, and a part of them once more.
    A measurement: W_enc folded to raw activations.
    """
    groups, d_sae = len(objective.prefix_ends), objective.d_sae
    acts, errors = batch * d_sae, batch * groups * d_out
    wide = acts * (4 + 1) + errors * 4 + 4 * batch * (d_in + d_out) * 4
    step = wide + int(1.25 * DENSER * objective.k * batch) * 48
    bfloat16 = objective.precision == "bfloat16"
    if device.type == "cpu":
        step += 2 * d_sae * d_in if bfloat16 else 0
    else:
        step += 4 * d_sae * (d_in + d_out)
        if bfloat16:
            step += acts * (1 + 3 * 2) + errors * (4 + 2) + 2 * d_sae * (d_in + d_out) + 4 * d_sae * d_out
        elif objective.dense or objective.precision == "tfloat32":
            step += acts * (1 + 2 * 4) + errors * 4 + 4 * d_sae * d_out
    if processes > 1:
        step += 4 * d_sae * (d_in + d_out) * (PARTS + 1) // PARTS
    return step + 4 * d_sae * d_in


def peak(device: torch.device) -> int | None:
    """The most bytes that this process has held at once: on a GPU those that PyTorch allocated, else resident memory.

    None where that cannot be told: Linux only. Unlike getrusage's, VmHWM is this program's alone.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = status.read_text(encoding="utf-8").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)


def available(device: torch.device) -> int | None:
    """Bytes that are free for this process, of the machine or its container; None where that cannot be told."""
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

    On a GPU both are in the GPU's memory; loader and program are always in the host's, which all processes of a machine
    share.
    """
    parts = f"{state / GIB:.1f} of weights and Adam, {on_top / GIB:.1f} of a step"
    if device.type == "cpu":
        needs = [(CPU, state + on_top + PROGRAM + LOADER, f"{parts}, the rest loader and program")]
    else:
        needs = [(device, state + on_top, parts), (CPU, PROGRAM + LOADER, "loader and program")]
    for place, needed, what in needs:
        free, sharing = available(place), here() if place.type == "cpu" else 1
        if free is not None and needed * sharing > free:
            where = "" if device.type == "cpu" else f" on {place}"
            each = f" in each of {sharing} processes" if sharing > 1 else ""
            raise InputError(
                f"memory: training needs about {needed / GIB:.1f} GiB{where}{each} ({what}), {free / GIB:.1f} GiB are "
                "free; lower transcoder.d_sae or train.batch_size, split the latents over processes "
                "(train.latent_shards; make plan lists what fits), or sweep fewer runs at a time"
            )

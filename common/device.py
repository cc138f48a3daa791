"""What the process may compute with: one answer for every stage."""

import os
import re
import sys
import time
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from common import container
from common.errors import InputError
from common.nodes.environment import here, world

LOOK = 0.5
"""Seconds over which other programs are watched."""
STAT = Path("/proc/stat")


def pick_device(name: str) -> torch.device:
    """The device of `model.device`; raises `InputError` when it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ and world() > 1:
        # One GPU a process; srun --gpus-per-task shows each task no other than its own.
        own = "SLURM_LOCALID" in os.environ and torch.cuda.device_count() == 1
        name = "cuda:0" if own else f"cuda:{os.environ['LOCAL_RANK']}"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise InputError(f"model.device: expected auto, cpu, cuda or cuda:N, found {name!r}")
    device, there = torch.device(name), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= there:
        gpus = f"{there} GPU(s)" if there else "no GPU"
        raise InputError(f"model.device: {name} requested, but PyTorch finds {gpus}; use --model.device cpu")
    return device


@cache
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """These few numbers on the device, copied there once: a copy in every step would make the host wait."""
    return torch.tensor(values, dtype=dtype, device=device)  # sync: the first time


def cores() -> int:
    """Processors that this process may use: fewer than the machine's where it is pinned, in a container, or one of
    several of a run on this machine.
    """
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(there, container.cores_allowed() or there) // here())


def share_cores() -> None:
    """Leave PyTorch one thread less for each core that other programs keep busy now, at least one, and say so.

    PyTorch's threads wait for each other spinning: beside one busy process two of them train at less than the speed of
    one (bench/shared.py). OMP_NUM_THREADS has precedence; torchrun sets it. Linux only. One of several processes takes
    its share: the others are what keeps the cores busy.
    """
    if "OMP_NUM_THREADS" in os.environ or not STAT.exists():
        return
    if world() > 1:
        torch.set_num_threads(cores())
        return
    mine = os.sched_getaffinity(0)
    before = busy_ticks(STAT.read_text(encoding="utf-8"), mine)
    time.sleep(LOOK)
    after = busy_ticks(STAT.read_text(encoding="utf-8"), mine)
    taken = (after - before) / (LOOK * os.sysconf("SC_CLK_TCK"))
    allowed = cores()  # of a container with a quota, fewer than it sees
    threads = min(allowed, threads_beside(taken, len(mine)))
    if threads < len(mine):
        torch.set_num_threads(threads)
        others = f"as other programs keep {taken:.1f} cores busy"
        why = others if threads < allowed else "the CPU limit of this container"
        print(
            f"threads: {threads} of {len(mine)}, {why}; OMP_NUM_THREADS={len(mine)} takes all",
            file=sys.stderr,
        )


def busy_ticks(stat: str, cores: set[int]) -> int:
    """Clock ticks that these cores have spent working, from the text of /proc/stat."""
    total = 0
    for line in stat.splitlines():
        name, _, numbers = line.partition(" ")
        if name.startswith("cpu") and name[3:].isdecimal() and int(name[3:]) in cores:
            user, nice, system, _idle, _iowait, irq, softirq, *_ = map(int, numbers.split())
            total += user + nice + system + irq + softirq
    return total


def threads_beside(taken: float, cores: int) -> int:
    """Threads for a stage where other programs keep `taken` of its `cores` busy; half a core counts as one."""
    return max(1, cores - int(taken + 0.5))

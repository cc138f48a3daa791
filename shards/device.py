"""What the process may compute with: one answer for every stage."""

import os
import re

import torch

from pipeline import InputError


def pick_device(name: str) -> torch.device:
    """The device of `model.device`; raises `InputError` when it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"  # torchrun: one GPU a process
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise InputError(f"model.device: expected auto, cpu, cuda or cuda:N, found {name!r}")
    device, there = torch.device(name), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= there:
        gpus = f"{there} GPU(s)" if there else "no GPU"
        raise InputError(f"model.device: {name} asked for, but PyTorch finds {gpus}; use --model.device cpu")
    return device


def cores() -> int:
    """Processors that this process may use: fewer than the machine's where it is pinned or in a container."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

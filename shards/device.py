"""What the process may compute with: one answer for every stage."""

import os

import torch

from pipeline import InputError


def pick_device(name: str) -> torch.device:
    """The device of `model.device`; raises `InputError` when it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"  # torchrun: one GPU a process
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"model.device: expected auto, cpu or cuda, found {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"model.device: {name} asked for, but PyTorch finds no GPU; use --model.device cpu")
    return device


def cores() -> int:
    """Processors that this process may use: fewer than the machine's where it is pinned or in a container."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

"""Several processes, started by torchrun: who am I, and wait for the others."""

import os

import torch.distributed as dist


def rank() -> int:
    """This process's number, from 0."""
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join() -> None:
    """Meet the other processes; on the CPU side only, whatever device the model is on."""
    if world() > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")


def barrier() -> None:
    """Wait until every process is here."""
    if world() > 1:
        dist.barrier()


def leave() -> None:
    """Part from the others; nothing to do when they never met."""
    if dist.is_initialized():
        dist.destroy_process_group()

"""Several processes on one harvest: who am I, and wait for the others."""

import torch.distributed as dist

from shards.processes import meet, rank, wait, world

__all__ = ["barrier", "join", "leave", "rank", "world"]


def join() -> None:
    """Meet the other processes; on the CPU side only, whatever device the model is on."""
    meet("gloo")


barrier = wait


def leave() -> None:
    """Part from the others; nothing to do when they never met."""
    if dist.is_initialized():
        dist.destroy_process_group()

"""The processes that train one run together, each on its share of every batch.

Every function is called by all of them, in the same order. Alone, they cost nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from shards.processes import meet, world


@dataclass(frozen=True)
class Peers:
    """Process `rank` of `world`."""

    rank: int = 0
    world: int = 1

    @property
    def leads(self) -> bool:
        """The one process that writes files and talks."""
        return self.rank == 0

    def total(self, tensor: Tensor) -> Tensor:
        """Sum over the processes, in place; the same bits on each."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def gathered(self, values: Tensor) -> Tensor:
        """All processes' one-dimensional values, of any lengths, in order of rank."""
        if self.world == 1:
            return values
        lengths = self._everyone(torch.tensor([len(values)], device=values.device))
        longest = max(int(length) for length in lengths)
        padded = values.new_zeros(longest)
        padded[: len(values)] = values
        parts = self._everyone(padded)
        return torch.cat([part[: int(length)] for part, length in zip(parts, lengths, strict=True)])

    def _everyone(self, tensor: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(parts, tensor)
        return parts

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether any process says so."""
        if self.world == 1:
            return flag
        return bool(self.total(torch.tensor(float(flag), device=device)))

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            dist.barrier()


ALONE = Peers()


@contextmanager
def joined(device: torch.device) -> Iterator[Peers]:
    """The processes that torchrun started (gloo on CPU, nccl on CUDA), or this one alone."""
    if world() == 1:
        yield ALONE
        return
    meet("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Peers(dist.get_rank(), world())
    finally:
        dist.destroy_process_group()

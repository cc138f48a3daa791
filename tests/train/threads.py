"""Processes of a mesh as threads of one process: what each would send, the others get."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from common.mesh import Mesh
from common.processes import ALONE, CPU, Processes


@dataclass
class Meeting:
    """Where the threads of one group leave what they send."""

    world: int
    sent: int = 0
    """Values that each of them has handed over so far, counted by the first."""

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.world, timeout=60)
        self.places: list[Any] = [None] * self.world

    def exchange(self, rank: int, tensor: Tensor) -> list[Tensor]:
        """What all of them have handed over, in order of rank."""
        if rank == 0:
            self.sent += tensor.numel()
        self.places[rank] = tensor.clone()
        self.barrier.wait()
        everyones = list(self.places)
        self.barrier.wait()
        return everyones


@dataclass(frozen=True)
class Threads(Processes):
    """Thread `rank` of a group that meets in memory."""

    meeting: Meeting = field(default_factory=lambda: Meeting(1))

    def total(self, tensor: Tensor) -> Tensor:
        if self.world == 1:
            return tensor
        return tensor.copy_(torch.stack(self._everyone(tensor)).sum(0))

    def total_later(self, tensor: Tensor) -> Callable[[], object]:
        self.total(tensor)
        return lambda: None

    def wait(self) -> None:
        self.any(False)

    def _everyone(self, tensor: Tensor) -> list[Tensor]:
        return self.meeting.exchange(self.rank, tensor)


T = TypeVar("T")


def meshes(rows: int, latents: int, device: torch.device = CPU) -> list[Mesh]:
    """The places of a mesh of rows x latents, in order of rank; their tensors are on `device`."""
    everyone = Meeting(rows * latents)
    of_latents = [Meeting(rows) for _ in range(latents)]
    of_rows = [Meeting(latents) for _ in range(rows)]

    def group(rank: int, meeting: Meeting) -> Processes:
        return Threads(rank, meeting.world, device, meeting=meeting) if meeting.world > 1 else ALONE

    return [
        Mesh(group(r * latents + i, everyone), group(r, of_latents[i]), group(i, of_rows[r]))
        for r in range(rows)
        for i in range(latents)
    ]


def together(places: list[Mesh], work: Callable[[Mesh], T]) -> list[T]:
    """What each place's own thread gives, in order of rank; an error in one ends all."""

    def one(place: Mesh) -> T:
        try:
            return work(place)
        except BaseException:
            for group in (place.everyone, place.rows, place.latents):
                if isinstance(group, Threads):
                    group.meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(len(places)) as pool:
        waiting = [pool.submit(one, place) for place in places]
        errors = [error for each in waiting if (error := each.exception())]
        for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise error
        return [each.result() for each in waiting]

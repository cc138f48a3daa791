"""The processes of a run as threads of the test: what they exchange is summed in memory."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from common.processes import Processes

Result = TypeVar("Result")
SECONDS = 300


class Exchange:
    """Where threads meet, each with a tensor of the same kind."""

    def __init__(self, world: int) -> None:
        self.barrier = threading.Barrier(world, timeout=SECONDS)
        self.brought: list[tuple[str, Tensor]] = [("", torch.zeros(0))] * world

    def everyone(self, rank: int, what: str, tensor: Tensor) -> list[Tensor]:
        """All threads' tensors, by rank; they must have called the same method with the same shape."""
        self.brought[rank] = what, tensor.clone()
        self.barrier.wait()
        found = [*self.brought]
        self.barrier.wait()
        kinds = {(name, each.dtype, each.shape) for name, each in found}
        assert len(kinds) == 1, f"ranks exchange different things: {kinds}"
        return [each for _, each in found]


@dataclass(frozen=True)
class Threads(Processes):
    """Thread `rank` of `world`."""

    exchange: Exchange = field(default_factory=lambda: Exchange(1))

    def total(self, tensor: Tensor) -> Tensor:
        """See Processes."""
        parts = self.exchange.everyone(self.rank, "total", tensor)
        return tensor.copy_(torch.stack(parts).sum(0, dtype=tensor.dtype))

    def largest(self, tensor: Tensor) -> Tensor:
        """See Processes."""
        return tensor.copy_(torch.stack(self.exchange.everyone(self.rank, "largest", tensor)).amax(0))

    def _everyone(self, tensor: Tensor) -> list[Tensor]:
        return self.exchange.everyone(self.rank, "gathered", tensor)


def in_threads(world: int, body: Callable[[Processes], Result]) -> list[Result]:
    """What `body` returns on each of `world` ranks; raises what the first failed one has raised."""
    exchange, results, errors = Exchange(world), dict[int, Result](), list[BaseException]()

    def run(rank: int) -> None:
        try:
            results[rank] = body(Threads(rank, world, exchange=exchange))
        except BaseException as error:
            errors.append(error)
            exchange.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(world)]

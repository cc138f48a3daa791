"""What a pass reads of a store: rows, block by block, with the text they stand in.

Shapes: n rows, B rows of a block, D_in, D_out, C contexts of T tokens.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from common.processes import ALONE, Processes
from shards.text.tokens import ContextTable

BLOCK_ROWS = 1024
"""Rows per step of a pass: the store's chunk, so that no chunk is decoded twice."""
MEET = 16
"""Blocks after which processes wait for each other: PyTorch gives up a wait of ten minutes (nccl), and one may be much
slower than another."""


class Split(Protocol):
    """The part of `shards.StoreSplit` that a pass over activations reads."""

    def __len__(self) -> int: ...

    def rows(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Rows [start, stop) as (inputs [n, D_in], outputs [n, D_out])."""
        ...


class TextSplit(Split, Protocol):
    """A split that also knows which token each row stands on."""

    @property
    def contexts(self) -> ContextTable:
        """The token ids of the text."""
        ...

    def provenance(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """(context number, position in it), [n] each, of rows [start, stop)."""
        ...


def share(n: int, peers: Processes, block: int) -> tuple[int, int]:
    """[start, stop) of the things below `n` that this process takes: whole blocks, the first process the first ones.

    >>> [share(10, Processes(rank, world=3), block=2) for rank in range(3)]
    [(0, 2), (2, 6), (6, 10)]
    """
    count = -(-n // block)
    start, stop = (block * (count * each // peers.world) for each in (peers.rank, peers.rank + 1))
    return start, min(stop, n)


def own_rows(n_rows: int, peers: Processes) -> tuple[int, int]:
    """[start, stop) of this process's part of a pass over `n_rows` rows."""
    return share(n_rows, peers, BLOCK_ROWS)


def blocks(n_rows: int, peers: Processes = ALONE) -> Iterator[tuple[int, int]]:
    """[start, stop) of the blocks of a pass over `n_rows` rows; with `peers`, of this process's part of them."""
    first, last = own_rows(n_rows, peers)
    together = -(-n_rows // BLOCK_ROWS) // peers.world
    for number, start in enumerate(range(first, last, BLOCK_ROWS), 1):
        yield start, min(start + BLOCK_ROWS, last)
        if number % MEET == 0 and number <= together:
            peers.wait()


def batches(
    split: Split, bounds: Iterable[tuple[int, int]], device: torch.device
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """(start, stop, inputs [B, D_in], outputs [B, D_out]) of each block, on the device.

    For a GPU a thread decodes the next block meanwhile; on a CPU it would take a core from the products.
    """
    if device.type == "cpu":
        yield from ((start, stop, *split.rows(start, stop)) for start, stop in bounds)
        return

    def pinned(start: int, stop: int) -> tuple[int, int, list[Tensor]]:
        return start, stop, [values.pin_memory() for values in split.rows(start, stop)]

    with ThreadPoolExecutor(1, "evaluate-rows") as reader:
        waiting: deque[Future[tuple[int, int, list[Tensor]]]] = deque()
        for bound in bounds:
            waiting.append(reader.submit(pinned, *bound))
            if len(waiting) > 1:
                yield _moved(waiting.popleft().result(), device)
        for last in waiting:
            yield _moved(last.result(), device)


def _moved(block: tuple[int, int, list[Tensor]], device: torch.device) -> tuple[int, int, Tensor, Tensor]:
    start, stop, (inputs, outputs) = block
    return start, stop, inputs.to(device, non_blocking=True), outputs.to(device, non_blocking=True)

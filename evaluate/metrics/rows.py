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

from shards.text.tokens import ContextTable

BLOCK_ROWS = 1024
"""Rows per step of a pass: the store's chunk, so that no chunk is decoded twice."""


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


def blocks(n_rows: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of the blocks of a pass over `n_rows` rows."""
    for start in range(0, n_rows, BLOCK_ROWS):
        yield start, min(start + BLOCK_ROWS, n_rows)


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

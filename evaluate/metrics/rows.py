"""What a pass reads of a store: rows, block by block, with the text they stand in.

Shapes: n rows, D_in, D_out, C contexts of T tokens.
"""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
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

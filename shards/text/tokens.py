"""The tokens that rows stand on.

Shapes: n rows, C contexts of T tokens.
"""

from typing import NamedTuple, Protocol

import numpy as np


class ContextTable(Protocol):
    """[C, T] int32 token ids, as `shards.reader.Contexts` reads them or an array holds them."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, numbers: np.ndarray, /) -> np.ndarray: ...


class RowTokens(NamedTuple):
    """The token of each row."""

    ids: np.ndarray
    """[n] int32"""
    texts: list[str]
    """Of each token on its own; bytes in hexadecimal if it is not whole characters: "<E2>"."""


def tokens_at(contexts: ContextTable, context: np.ndarray, position: np.ndarray) -> np.ndarray:
    """[n] int32 token ids at places (context number, position in it), [n] each."""
    distinct, which = np.unique(context, return_inverse=True)
    return contexts[distinct][which, position]

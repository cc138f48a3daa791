"""Active latents as sparse triples, and decoding from them.

Shapes: B rows of a block, F latents, G prefixes, D_in and D_out widths, E active entries.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from train import Transcoder

BLOCK_ROWS = 1024
"""Rows per step of a pass: the store's chunk, so that no chunk is decoded twice."""


class Split(Protocol):
    """The part of shards.Store's splits that a pass reads."""

    def __len__(self) -> int: ...

    def rows(self, start: int, stop: int) -> tuple[Tensor, Tensor]: ...


class TextSplit(Split, Protocol):
    """A split that also knows which token each row stands on."""

    @property
    def contexts(self) -> Any: ...

    def provenance(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]: ...


@dataclass(frozen=True)
class Entries:
    """The active entries of a block of rows under one prefix, sorted by row."""

    rows: Tensor
    """[E] int64, row within the block."""
    latents: Tensor
    """[E] int64."""
    values: Tensor
    """[E] float32, positive."""
    n_rows: int
    """B; rows without an active latent have no entry."""

    def keep(self, mask: Tensor) -> "Entries":
        return Entries(self.rows[mask], self.latents[mask], self.values[mask], self.n_rows)

    def l0(self) -> Tensor:
        """[B] int64, active latents of each row."""
        return torch.bincount(self.rows, minlength=self.n_rows)


def entries_above(pre: Tensor, threshold: Tensor | float) -> Entries:
    """Entries of `pre` [B, F] that exceed `threshold` (a number, or [F]) and are positive."""
    rows, latents = torch.nonzero((pre > threshold) & (pre > 0), as_tuple=True)
    return Entries(rows, latents, pre[rows, latents], len(pre))


def prefix_entries(pre: Tensor, coder: Transcoder) -> list[Entries]:
    """For each prefix g the entries of its latents [0, P_g) above its own threshold theta_g.

    The dense [B, F] array is searched once, with the lowest threshold of each latent.
    """
    thresholds = coder.thresholds
    loose = entries_above(pre, thresholds.amin(0))
    made = []
    for end, threshold in zip(coder.prefix_ends, thresholds, strict=True):
        own = threshold if threshold.ndim == 0 else threshold[loose.latents]
        made.append(loose.keep((loose.latents < end) & (loose.values > own)))
    return made


def base_output(coder: Transcoder, inputs: Tensor) -> Tensor:
    """[B, D_out] what the coder says with no latent active: b_dec (+ W_skip x)."""
    if coder.W_skip is None:
        return coder.b_dec.expand(len(inputs), -1)
    return torch.addmm(coder.b_dec, inputs, coder.W_skip.T)


def decode(entries: Entries, W_dec: Tensor, base: Tensor) -> Tensor:
    """base + sum over the entries of value * W_dec[latent]: [B, D_out].

    embedding_bag over row-sorted entries: at K of F latents active it does K/F of the dense product's work.
    """
    offsets = torch.zeros(entries.n_rows, dtype=torch.int64, device=entries.rows.device)
    offsets[1:] = entries.l0().cumsum(0)[:-1]
    summed = embedding_bag(
        entries.latents, W_dec, offsets, mode="sum", per_sample_weights=entries.values.to(W_dec.dtype)
    )
    return base + summed


def blocks(n_rows: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of the blocks of a pass over `n_rows` rows."""
    for start in range(0, n_rows, BLOCK_ROWS):
        yield start, min(start + BLOCK_ROWS, n_rows)

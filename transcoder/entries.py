"""The active latents of some rows as sparse triples, and decoding from them.

Shapes: n rows, F latents, E active entries, D_out.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag


class Entries(NamedTuple):
    """The active (row, latent) pairs of `n_rows` rows, sorted by row, then latent."""

    rows: Int[Tensor, " E"]
    """int64, from 0."""
    latents: Int[Tensor, " E"]
    values: Float[Tensor, " E"]
    """Activations, all positive."""
    n_rows: int
    """n; a row without an active latent has no entry."""

    def only(self, mask: Bool[Tensor, " E"]) -> "Entries":
        """The entries that `mask` names, of as many rows."""
        return Entries(self.rows[mask], self.latents[mask], self.values[mask], self.n_rows)

    def l0(self) -> Int[Tensor, " n"]:
        """Active latents of each row."""
        return torch.bincount(self.rows, minlength=self.n_rows)


def entries_above(pre: Float[Tensor, "n F"], threshold: Tensor | float) -> Entries:
    """Entries of pre-activations that are positive and exceed `threshold` (a number, or [F])."""
    rows, latents = torch.nonzero((pre > threshold) & (pre > 0), as_tuple=True)
    return Entries(rows, latents, pre[rows, latents], len(pre))


def decode(
    entries: Entries, W_dec: Float[Tensor, "F D_out"], base: Float[Tensor, "n D_out"]
) -> Float[Tensor, "n D_out"]:
    """base + sum over a row's entries of value * W_dec[latent].

    embedding_bag over row-sorted entries: at K of F latents active it does K/F of the dense product's work.
    """
    offsets = torch.zeros(entries.n_rows, dtype=torch.int64, device=entries.rows.device)
    offsets[1:] = entries.l0().cumsum(0)[:-1]
    summed = embedding_bag(
        entries.latents, W_dec, offsets, mode="sum", per_sample_weights=entries.values.to(W_dec.dtype)
    )
    return base + summed

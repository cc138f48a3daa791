"""The active latents of some rows as sparse triples; decoding from them, and the strongest of each latent.

Shapes: n rows, F latents, E active entries, D_out.
"""

from collections.abc import Callable, Sequence
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
        """The entries that `mask` selects; `n_rows` stays."""
        kept = mask.nonzero().squeeze(
            1
        )  # sync: how many; three selections by the mask would wait three times
        return self.at(kept)

    def at(self, kept: Int[Tensor, " m"]) -> "Entries":
        """The entries at these places; `n_rows` stays."""
        return Entries(self.rows[kept], self.latents[kept], self.values[kept], self.n_rows)

    def each(self, masks: Bool[Tensor, "G E"]) -> "list[Entries]":
        """The entries that each of several masks selects. On a GPU the host waits twice, however many there are."""
        if masks.is_cpu:
            return [self.only(mask) for mask in masks]
        kept = masks.nonzero()[:, 1]  # sync: how many of all
        return [self.at(part) for part in kept.split(masks.sum(1).tolist())]  # sync: how many of each

    def l0(self) -> Int[Tensor, " n"]:
        """The number of active latents of each row (L0)."""
        return self.bounds().diff()

    def bounds(self) -> Int[Tensor, " m"]:
        """[n + 1]: row r's entries are [bounds[r], bounds[r + 1])."""
        return torch.searchsorted(self.rows, torch.arange(self.n_rows + 1, device=self.rows.device))


def entries_above(pre: Float[Tensor, "n F"], threshold: Tensor | float, k: int | None = None) -> Entries:
    """Entries of pre-activations that are positive and exceed `threshold` (a number, or [F]).

    This is JumpReLU's gate (Rajamanoharan et al. 2024, arXiv:2407.14435). The threshold here is calibrated after
    training (train/measure.py), not learned. With `k`, of them only those among the `k` largest of their row.
    """
    pre = largest_of_rows(pre, k)
    # one comparison: three passes over [n, F] take a fifth as long as the product that made it
    least = threshold.clamp_min(0) if isinstance(threshold, Tensor) else max(threshold, 0.0)
    rows, latents = torch.nonzero(pre > least, as_tuple=True)
    return Entries(rows, latents, pre[rows, latents], len(pre))


def joined(parts: Sequence[tuple[int, Entries]]) -> Entries:
    """The entries of neighbouring slices of latents as one; of each its first latent, and its entries, numbered from 0.

    >>> part = Entries(torch.tensor([0, 1]), torch.tensor([1, 0]), torch.tensor([0.5, 2.0]), n_rows=2)
    >>> joined([(0, part), (4, part)]).latents.tolist()  # of row 0, then of row 1
    [1, 5, 0, 4]
    """
    (_, first), *others = parts
    if not others:
        return first
    rows, values = torch.cat([part.rows for _, part in parts]), torch.cat([part.values for _, part in parts])
    latents = torch.cat([part.latents + start for start, part in parts])
    return Entries(rows, latents, values, first.n_rows).at(rows.sort(stable=True).indices)


def reselected(entries: Entries, select: Callable[[Tensor], Entries]) -> Entries:
    """Those of the entries that `select` selects of a matrix [n, m] that has no others.

    >>> entries = Entries(torch.tensor([0, 0, 1]), torch.tensor([3, 70, 9]), torch.tensor([2.0, 5.0, 1.0]), n_rows=2)
    >>> reselected(entries, lambda pre: entries_above(pre, 0.0, k=1)).latents.tolist()
    [70, 9]
    """
    bounds = entries.bounds()
    nth = torch.arange(len(entries.rows), device=entries.rows.device) - bounds[entries.rows]
    matrix = entries.values.new_zeros(
        entries.n_rows, max(1, int(bounds.diff().max()))
    )  # sync: how many in a row
    matrix[entries.rows, nth] = entries.values
    chosen = select(matrix)
    kept = torch.zeros_like(matrix, dtype=torch.bool)
    kept[chosen.rows, chosen.latents] = True
    return entries.only(kept[entries.rows, nth])


def largest_of_rows(pre: Float[Tensor, "n F"], k: int | None) -> Float[Tensor, "n F"]:
    """`pre` with all but the `k` largest of each row made zero, exactly `k` kept where values are equal; all if None.

    >>> largest_of_rows(torch.tensor([[0.9, 0.1, 0.8], [0.2, -1.0, 0.3]]), k=1).tolist()
    [[0.8999999761581421, 0.0, 0.0], [0.0, 0.0, 0.30000001192092896]]
    """
    if k is None or k >= pre.shape[1]:
        return pre
    values, latents = pre.topk(k, dim=1, sorted=False)
    return torch.zeros_like(pre).scatter_(1, latents, values)


def decode(
    entries: Entries, W_dec: Float[Tensor, "F D_out"], base: Float[Tensor, "n D_out"]
) -> Float[Tensor, "n D_out"]:
    """base + sum over a row's entries of value * W_dec[latent].

    embedding_bag over row-sorted entries does K/F of the dense product's work when K of F latents are active.

    >>> entries = Entries(torch.tensor([0, 0, 2]), torch.tensor([1, 0, 1]), torch.tensor([2.0, 1.0, 3.0]), n_rows=3)
    >>> decode(entries, W_dec=torch.tensor([[1.0], [10.0]]), base=torch.tensor([[0.0], [0.5], [0.0]])).tolist()
    [[21.0], [0.5], [30.0]]
    """
    summed = embedding_bag(
        entries.latents,
        W_dec,
        entries.bounds()[:-1],
        mode="sum",
        per_sample_weights=entries.values.to(W_dec.dtype),
    )
    return base + summed


def strongest(latents: Int[Tensor, " E"], ranks: Int[Tensor, " E"], n: int) -> Int[Tensor, " m"]:
    """Indices of each latent's `n` entries of highest rank, sorted by latent, then rank, highest first.

    Ranks are whole numbers below 2^32. Equal ones stay in the order they come in. Latent and inverted rank are one sort
    key, latent * 2^32 + (2^32 - 1 - rank).

    >>> latents, ranks = torch.tensor([7, 3, 7, 7, 3]), torch.tensor([10, 5, 30, 20, 6])
    >>> strongest(latents, ranks, n=2)  # of latent 3 entries 4 and 1, of latent 7 entries 2 and 3
    tensor([4, 1, 2, 3])
    """
    keys = (latents.long() << 32) | (0xFFFFFFFF - ranks.long())
    order = keys.sort(stable=True).indices
    of = latents[order]
    # A latent's first place in sorted `of` is where searchsorted finds it; the distance from there counts its entries.
    nth = torch.arange(len(of), device=of.device) - torch.searchsorted(of, of)
    return order[nth < n]  # sync: how many are kept

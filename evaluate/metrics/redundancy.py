"""Decoder rows that point the same way: exact over all pairs, in blocks.

Shapes: F latents, D_out width, n neighbours. `share` is the share of latent
pairs whose decoder rows have |cosine| > 0.9. Some tools call it "absorption score"; it is not SAEBench's absorption.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from common.processes import ALONE, Processes
from evaluate.metrics.rows import share
from evaluate.records import PairShare, RedundancyMetrics

LIMIT = 0.9
COSINE_BINS = np.linspace(0, 1, 51)
BLOCK = 1024
"""Rows of the similarity matrix at once: 75 MB at 18,432 latents."""
TILE = 1 << 16
"""Columns of it at once: 0.27 GB."""


@dataclass(frozen=True)
class Neighbours:
    """The latents whose decoder rows are closest to each latent's."""

    latents: Tensor
    """[F, n] int64, nearest first, never the latent itself."""
    cosines: Tensor
    """[F, n] float32."""


def decoder_similarity(
    W_dec: Tensor, prefix_ends: Sequence[int], n_neighbours: int = 8, peers: Processes = ALONE
) -> tuple[RedundancyMetrics, Neighbours]:
    """Redundancy of every prefix, and the nearest neighbours in the full dictionary.

    cosine(i, j) = <W_dec[i], W_dec[j]> / (|W_dec[i]| |W_dec[j]|), 0 where a row is zero. A pair belongs to
    every prefix that holds its larger index, so one look at each pair counts all prefixes. With `peers` each process
    takes some of the rows.
    """
    n_latents = len(W_dec)
    n_neighbours = min(n_neighbours, n_latents - 1)
    by_larger = torch.zeros(n_latents, dtype=torch.int64, device=W_dec.device)
    nearest = by_larger.new_zeros(n_latents, n_neighbours)
    cosines = nearest.float()
    whole = normalize(W_dec.float(), dim=1) if n_latents <= TILE else None
    first, last = share(n_latents, peers, BLOCK)
    for start in range(first, last, BLOCK):
        stop = min(start + BLOCK, last)
        block = _block(W_dec, whole, slice(start, stop), n_neighbours)
        cosines[start:stop], nearest[start:stop], by_larger[start:stop] = block
    peers.wait()
    close, nearest, cosines = (peers.total(each) for each in (by_larger, nearest, cosines))
    close = close.cumsum(0).tolist()
    shares = [_share(close[end - 1], end) for end in prefix_ends]
    neighbours = Neighbours(nearest.cpu(), cosines.cpu())
    histogram, _ = np.histogram(neighbours.cosines[:, :1].clamp(0, 1).numpy().ravel(), bins=COSINE_BINS)
    metrics = RedundancyMetrics(
        **dict(shares[-1]),
        limit=LIMIT,
        prefixes=shares,
        nearest_cosine_edges=COSINE_BINS.tolist(),
        nearest_cosine_histogram=histogram.tolist(),
    )
    return metrics, neighbours


def _block(
    W_dec: Tensor, whole: Tensor | None, own: slice, n_neighbours: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(cosines and numbers [B, n] of the nearest of some latents, [B] how many before each are close to it).

    `whole`: all rows at unit norm, where they are made once.
    """
    n_latents, last = len(W_dec), own.stop
    close = torch.zeros(last - own.start, dtype=torch.int64, device=W_dec.device)
    found: list[tuple[Tensor, Tensor]] = []
    for left in range(0, n_latents, TILE):
        tile = _unit(W_dec, whole, own) @ _unit(W_dec, whole, slice(left, left + TILE)).T
        first = max(own.start, left)
        themselves = torch.arange(first, max(first, min(last, left + TILE)), device=tile.device)
        tile[themselves - own.start, themselves - left] = -torch.inf
        top = tile.topk(min(n_neighbours, tile.shape[1]), dim=1)
        found.append((top.values, top.indices + left))
        before = tile[:, : max(0, last - left)].abs_() > LIMIT
        close += before.tril_(own.start - left - 1).sum(1)
    if len(found) == 1:
        return *found[0], close
    cosines, nearest = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    best = cosines.topk(n_neighbours, dim=1)
    return best.values, nearest.gather(1, best.indices), close


def _unit(W_dec: Tensor, whole: Tensor | None, own: slice) -> Tensor:
    return normalize(W_dec[own].float(), dim=1) if whole is None else whole[own]


def _share(close: int, end: int) -> PairShare:
    pairs = end * (end - 1) // 2
    return PairShare(pairs=pairs, close_pairs=close, share=close / pairs if pairs else None)

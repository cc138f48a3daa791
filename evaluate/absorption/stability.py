"""Latents that another transcoder, of another seed say, has too.

Shapes: n rows, F latents, E firings, P pairs.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

COSINE, JACCARD = 0.7, 0.5
"""Of two decoder rows, and of two latents' rows on which they fire, above which they are partners."""
BLOCK = 1024
"""Rows of the matrix of cosines at once."""
TOGETHER = 1 << 22
"""Firings that are looked up together."""


@dataclass(frozen=True)
class Fired:
    """On which rows each latent fires."""

    keys: np.ndarray
    """[E] int64, ascending: latent * 2^32 + row."""
    counts: np.ndarray
    """[F] int64"""

    @classmethod
    def of(cls, firings: np.ndarray, n_latents: int) -> "Fired":
        """Of `firings` [2, E], latents and rows, in any order, each once."""
        latents, rows = firings
        keys = np.sort((latents.astype(np.int64) << 32) | rows.astype(np.int64))
        return cls(keys, np.bincount(latents, minlength=n_latents))


@torch.inference_mode()
def partnered(own: Fired, W_dec: Tensor, other: Fired, other_W_dec: Tensor) -> np.ndarray:
    """[F] bool: which latents have a partner in the other transcoder, on the same rows.

    cosine(i, j) of their decoder rows is above `COSINE`, 0 where a row is zero; |rows of i and j| / |rows of i or j| is
    above `JACCARD`. Two latents may have the same partner.
    """
    theirs = normalize(other_W_dec.float().cpu(), dim=1)
    found = np.zeros(len(own.counts), bool)
    for start, block in enumerate(normalize(W_dec.float().cpu(), dim=1).split(BLOCK)):
        i, j = (each.numpy() for each in (block @ theirs.T > COSINE).nonzero(as_tuple=True))
        i = i + start * BLOCK
        found[i[jaccard(own, other, i, j) > JACCARD]] = True
    return found


def jaccard(own: Fired, other: Fired, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """[P] of pairs of a latent `i` of `own` and one `j` of `other`; 0 where neither fires."""
    n = own.counts[i]
    both = np.zeros(len(i), np.int64)
    ends = np.flatnonzero(np.diff(np.cumsum(n) // TOGETHER, prepend=0))
    for first, last in pairwise([0, *ends.tolist(), len(i)]):
        pair = np.repeat(np.arange(first, last), n[first:last])
        nth = np.arange(len(pair)) - np.repeat(np.cumsum(n[first:last]) - n[first:last], n[first:last])
        begins = np.searchsorted(own.keys, i[first:last].astype(np.int64) << 32)
        rows = own.keys[np.repeat(begins, n[first:last]) + nth] & 0xFFFFFFFF
        wanted = (j[pair].astype(np.int64) << 32) | rows
        at = np.minimum(np.searchsorted(other.keys, wanted), max(len(other.keys) - 1, 0))
        hit = other.keys[at] == wanted if len(other.keys) else np.zeros(len(wanted), bool)
        both += np.bincount(pair[hit], minlength=len(i))
    either = n + other.counts[j] - both
    return np.divide(both, either, out=np.zeros(len(i)), where=either > 0)

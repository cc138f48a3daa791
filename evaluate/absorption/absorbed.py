"""On which rows of a class another latent stands in for its main latents.

Shapes: m rows, F latents.
"""

from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_matrix

SHARE = 0.4
"""Of a row's effect that must come from the absorbing latents; this and the next three as SAEBench 0.6 has them."""
ALIGNED, PARTLY_ALIGNED = 0.025, 0.1
"""Least cosine of an absorbing latent's decoder row and the direction, in outputs divided by their standard deviations;
of those that absorb a part."""
TOGETHER = 3
"""Latents that may absorb a part together."""
NONE = -1


class Absorbed(NamedTuple):
    """[m] each, of the rows of one class."""

    silent: np.ndarray
    """bool: no main latent fires."""
    absorbed: np.ndarray
    """bool: and another latent, aligned with the direction, has the greatest effect, at least `SHARE` of the row's."""
    fraction: np.ndarray
    """0 to 1: the part of the effect of main and absorbing latents that comes from the latter."""
    by: np.ndarray
    """int64: the latent that absorbs; NONE where it is not absorbed."""


def absorbed(
    acts: csr_matrix,
    main: list[int],
    effect: np.ndarray,
    cosine: np.ndarray,
    usual: np.ndarray,
    total: np.ndarray,
) -> Absorbed:
    """Of activations [m, F] and the effect [m] `total` of each row's outputs on the direction's logit.

    A latent's effect on a row is (activation - usual) * effect: `usual` [F] is its mean activation on rows that are not
    of the class, `effect` [F] the product of direction and decoder row, `cosine` [F] of the two, see `ALIGNED`.
    """
    m = len(total)
    row, latent = np.repeat(np.arange(m), np.diff(acts.indptr)), acts.indices.astype(np.int64)
    own = (acts.data - usual[latent]) * effect[latent]
    is_main = np.isin(latent, main)
    silent = np.bincount(row[is_main], minlength=m) == 0
    by, most = _greatest(row[~is_main], latent[~is_main], own[~is_main], m)
    aligned = (by != NONE) & (cosine[by] >= ALIGNED)
    full = silent & aligned & (total > 0) & (most >= SHARE * total)
    active = np.bincount(row[is_main], (acts.data * effect[latent])[is_main], minlength=m)
    mains = active - (usual[main] * effect[main]).sum()
    partly = ~is_main & (cosine[latent] >= PARTLY_ALIGNED) & (own > 0)
    others = _largest(row[partly], own[partly], m)
    return Absorbed(silent, full, _fraction(mains, others, total), np.where(full, by, NONE))


def _fraction(mains: np.ndarray, others: np.ndarray, total: np.ndarray) -> np.ndarray:
    """SAEBench's absorption fraction: 0 where main latents do all of it or others too little, 1 where others do all."""
    absorbs = (mains < total) & (total > 0) & (others >= SHARE * total)
    part = np.minimum(others, total - mains)
    share = part / np.where(absorbs, part + np.maximum(mains, 0), 1)
    return np.where(absorbs, np.clip(share, 0, 1), 0.0)


def _greatest(row: np.ndarray, latent: np.ndarray, own: np.ndarray, m: int) -> tuple[np.ndarray, np.ndarray]:
    """(latent, effect) of each row's entry of the greatest effect; (NONE, 0) of a row without one."""
    order = np.lexsort((own, row))
    last = order[np.flatnonzero(np.diff(row[order], append=m))]
    by, most = np.full(m, NONE), np.zeros(m)
    by[row[last]], most[row[last]] = latent[last], own[last]
    return by, most


def _largest(row: np.ndarray, own: np.ndarray, m: int) -> np.ndarray:
    """[m] sum of each row's `TOGETHER` greatest effects."""
    order = np.lexsort((-own, row))
    ordered = row[order]
    nth = np.arange(len(ordered)) - np.searchsorted(ordered, ordered)
    kept = order[nth < TOGETHER]
    return np.bincount(row[kept], own[kept], minlength=m)

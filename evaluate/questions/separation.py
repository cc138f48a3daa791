"""How well each latent separates marked rows from the others.

Shapes: n rows, F latents, E firings.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from evaluate.questions.firings import Firings

BLOCK = 1 << 20
"""Firings ranked together, whole latents: 50 MB."""


@dataclass(frozen=True)
class Separation:
    """[F] each. P rows are marked, N are not; a latent has `firings`, `hits` of them on marked rows."""

    firings: np.ndarray
    """int64"""
    hits: np.ndarray
    """int64"""
    marked: int
    """P"""
    rows: int
    """P + N"""
    auc: np.ndarray
    """float64, see `separation`."""

    @property
    def precision(self) -> np.ndarray:
        """hits / firings: share of its firings that are on marked rows; NaN for a latent that never fires."""
        return np.divide(self.hits, self.firings, out=np.full(len(self.hits), np.nan), where=self.firings > 0)

    @property
    def recall(self) -> np.ndarray:
        """hits / P: share of the marked rows on which it fires."""
        return self.hits / self.marked

    @property
    def f1(self) -> np.ndarray:
        """2 hits / (firings + P): harmonic mean of precision and recall, 0 without a hit."""
        return 2 * self.hits / (self.firings + self.marked)


def separation(firings: Firings, mask: np.ndarray) -> Separation:
    """Of each latent; `mask` [n] bool marks rows, at least one and not all.

    AUC, the area under the ROC curve: the probability that a latent's activation is higher on a random marked row than
    on a random other one, a tie counting half (Mann-Whitney's U / (P N)). Rows where it does not fire are tied at 0. It
    is counted in whole numbers, so it is exact but for the last division.
    """
    bounds, marked = firings.bounds, int(mask.sum())
    hits, doubled = np.zeros(len(bounds) - 1, np.int64), np.zeros(len(bounds) - 1, np.int64)
    for first, last in _blocks(bounds):
        own = slice(bounds[first], bounds[last])
        hits[first:last], doubled[first:last] = _ranked(
            mask[firings.rows[own]], firings.values[own], bounds[first : last + 1] - bounds[first]
        )
    total = np.diff(bounds)
    others = len(mask) - marked
    silent = others - (total - hits)  # rows that are not marked, without a firing
    doubled += (marked - hits) * silent + 2 * hits * silent
    return Separation(total, hits, marked, len(mask), doubled / (2 * marked * others))


def _ranked(marked: np.ndarray, values: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(hits, 2 U among the firings alone) of each latent: U counts the (marked, other) pairs whose marked value is
    higher, half where they are equal. Values ascend within a latent.

    Of one latent's firings 1, 2, 2, 3 the second and the last are marked: 2 beats 1 and ties with 2, 3 beats 1 and 2:

    >>> _ranked(np.array([False, True, False, True]), np.array([1.0, 2.0, 2.0, 3.0]), np.array([0, 4]))
    (array([2]), array([7]))
    """
    # A run of equal values of one latent begins where the value differs from the one before, and with each latent.
    begins = np.ones(len(values) + 1, bool)
    begins[1:-1] = values[1:] != values[:-1]
    begins[bounds] = True
    edges = np.flatnonzero(begins)
    others, hits = (np.concatenate([[0], np.cumsum(each)]) for each in (~marked, marked))
    before_latent = others[bounds[np.searchsorted(bounds, edges[:-1], "right") - 1]]
    pairs = np.diff(hits[edges]) * (others[edges[:-1]] + others[edges[1:]] - 2 * before_latent)
    summed = np.concatenate([[0], np.cumsum(pairs)])[np.searchsorted(edges, bounds)]
    return np.diff(hits[bounds]), np.diff(summed)


def _blocks(bounds: np.ndarray) -> Iterator[tuple[int, int]]:
    """[first, last) latents of at most BLOCK firings together, or one that has more."""
    first, n = 0, len(bounds) - 1
    while first < n:
        last = int(np.searchsorted(bounds, bounds[first] + BLOCK, "right")) - 1
        last = min(max(last, first + 1), n)
        yield first, last
        first = last

"""Which latents fire together: splitting, and how fine groups nest in coarse ones.

Shapes: R sampled rows, F latents, E active entries of the sample, n partners.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.processes import ALONE, Processes
from evaluate.metrics.rows import blocks
from transcoder.entries import Entries

SAMPLE_ROWS = 65_536
MIN_FIRINGS = 16
"""In the sample; below it an overlap says little: with 16 firings a share is known to about 0.12."""
CELLS = 1 << 22
"""Counters of a block of latents: 34 MB of int64, a handful of such arrays alive at once."""


@dataclass(frozen=True)
class Partners:
    """For each latent the others that go with it, best first; -1 where there is none."""

    latents: np.ndarray
    """[F, n] int32."""
    scores: np.ndarray
    """[F, n] float32."""

    def merge(self, peers: Processes) -> None:
        """Add what other processes have found of other latents: none of its own has both."""
        if peers.world == 1:
            return
        self.latents[...] += 1
        peers.add(self.latents, self.scores)
        self.latents[...] -= 1


class Coactivation:
    """The active (row, latent) pairs of at most `SAMPLE_ROWS` rows, spread evenly over the pass.

    All rows are kept when there are no more than that; else the first few of every block, which are a
    fair sample because stored rows are shuffled within their window. They stay on the entries' device.
    `before`: rows of the pass that another process adds, ahead of this one's.
    """

    def __init__(self, n_latents: int, n_rows: int, before: int = 0) -> None:
        self.n_latents = n_latents
        self.share = min(1.0, SAMPLE_ROWS / n_rows)
        self.rows = 0
        self._owed = 0.0
        self._rows: list[Tensor] = []
        self._latents: list[Tensor] = []
        for start, stop in blocks(before):
            self.rows += self._take(stop - start)

    def _take(self, n_rows: int) -> int:
        """How many of the pass's next rows are of the sample."""
        self._owed += self.share * n_rows
        take = min(n_rows, round(self._owed))
        self._owed -= take
        return take

    def add(self, entries: Entries) -> None:
        """The active entries of a pass's next block."""
        take = self._take(entries.n_rows)
        n = (
            len(entries.rows) if take == entries.n_rows else int((entries.rows < take).sum())
        )  # sync: how many
        self._rows.append((entries.rows[:n] + self.rows).int())
        self._latents.append(entries.latents[:n].int())
        self.rows += take

    def merge(self, peers: Processes) -> None:
        """Add the rows of all processes, which come one after another in order of rank."""
        if peers.world == 1:
            return
        none = torch.zeros(0, dtype=torch.int32, device=peers.device)
        for own in (self._rows, self._latents):
            own[:] = [peers.gathered(torch.cat(own or [none]))]
        self.rows = int(peers.largest(torch.tensor(self.rows, device=peers.device)))

    def partners(
        self, prefix_ends: Sequence[int], n: int = 4, peers: Processes = ALONE
    ) -> tuple[Partners, Partners]:
        """(twins, parents) of every latent that fires at least `MIN_FIRINGS` times in the sample.

        Twins have the highest Jaccard overlap |i and j| / |i or j|, in any group. Parents are latents of
        coarser groups with the highest P(parent | latent) - P(parent): how much more often the parent
        fires where the latent does than it does anywhere, so that one that always fires is nobody's. With `peers`
        each process computes those of some latents.
        """
        rows, latents = (torch.cat(parts).cpu().numpy() for parts in (self._rows, self._latents))
        firings = np.bincount(latents, minlength=self.n_latents)
        enough = firings >= MIN_FIRINGS
        group_start = np.repeat((0, *prefix_ends[:-1]), np.diff((0, *prefix_ends)))
        twins, parents = _empty(self.n_latents, n), _empty(self.n_latents, n)
        bounds = np.searchsorted(rows, np.arange(self.rows + 1))
        order = np.argsort(latents, kind="stable")
        first = np.searchsorted(latents[order], np.arange(self.n_latents + 1))
        step = max(1, CELLS // self.n_latents)
        # By turns: the first latents fire most
        for start in range(peers.rank * step, self.n_latents, peers.world * step):
            stop = min(start + step, self.n_latents)
            mine = order[first[start] : first[stop]]
            both = _overlaps(rows[mine], latents[mine] - start, latents, bounds, stop - start, self.n_latents)
            both[np.arange(stop - start), np.arange(start, stop)] = 0
            both[~enough[start:stop]] = 0
            both[:, ~enough] = 0
            own = firings[start:stop, None]
            jaccard = both / np.maximum(own + firings - both, 1)
            _best(twins, jaccard, start, n)
            lift = both / np.maximum(own, 1) - firings / max(self.rows, 1)
            lift[both == 0] = 0
            lift[np.arange(self.n_latents) >= group_start[start:stop, None]] = 0
            _best(parents, lift, start, n)
        for found in (twins, parents):
            found.merge(peers)
        return twins, parents


def _overlaps(
    rows: np.ndarray, own: np.ndarray, latents: np.ndarray, bounds: np.ndarray, n_own: int, n_latents: int
) -> np.ndarray:
    """[n_own, F] int64 rows on which own latent and other fire together.

    `rows`, `own` are the entries of the block's latents; the others active on those rows are
    latents[bounds[row]:bounds[row + 1]]. The work is the sum over rows of L0^2, not R F^2.

    Row 0 has latents 0 and 2, row 1 has 0, 1 and 2. The block is latents 0 and 1; latent 0 has entries on both rows:

    >>> latents, bounds = np.array([0, 2, 0, 1, 2]), np.array([0, 2, 5])
    >>> _overlaps(np.array([0, 1, 1]), np.array([0, 0, 1]), latents, bounds, n_own=2, n_latents=3).tolist()
    [[2, 1, 2], [1, 1, 1]]
    """
    counts = np.zeros(n_own * n_latents, dtype=np.int64)
    lengths = bounds[rows + 1] - bounds[rows]
    piece = max(1, CELLS // max(1, int(lengths.max(initial=1))))
    for start in range(0, len(rows), piece):
        part = slice(start, start + piece)
        length = lengths[part]
        ends = np.cumsum(length)
        inside = np.arange(ends[-1]) - np.repeat(ends - length, length)
        others = latents[np.repeat(bounds[rows[part]], length) + inside]
        counts += np.bincount(
            np.repeat(own[part].astype(np.int64) * n_latents, length) + others, minlength=len(counts)
        )
    return counts.reshape(n_own, n_latents)


def _empty(n_latents: int, n: int) -> Partners:
    return Partners(np.full((n_latents, n), -1, np.int32), np.zeros((n_latents, n), np.float32))


def _best(partners: Partners, scores: np.ndarray, start: int, n: int) -> None:
    """Writes each row's `n` highest positive scores.

    >>> partners = _empty(3, 2)
    >>> _best(partners, np.array([[0.0, 0.5, 0.9], [0.2, 0.0, 0.0]]), start=1, n=2)  # of latents 1 and 2
    >>> partners.latents.tolist()
    [[-1, -1], [2, 1], [0, -1]]
    """
    n = min(n, scores.shape[1])
    top = np.argpartition(-scores, n - 1, axis=1)[:, :n]
    values = np.take_along_axis(scores, top, axis=1)
    order = np.lexsort((top, -values), axis=1)
    top, values = np.take_along_axis(top, order, axis=1), np.take_along_axis(values, order, axis=1)
    stop = start + len(scores)
    partners.latents[start:stop, :n] = np.where(values > 0, top, -1)
    partners.scores[start:stop, :n] = np.maximum(values, 0)

"""How often and how strongly each latent fires.

Shapes: F latents of a prefix, E active entries, n classes.
"""

import numpy as np
import torch
from torch import Tensor

from common.processes import Processes
from evaluate.records import FiringMetrics
from transcoder.entries import Entries
from transcoder.frequent import FREQUENT

DENSITY_BINS = np.linspace(-6, 0, 49)
"""Edges of the histogram of log10(density): eight bins a decade; the lowest bin takes what is rarer."""


def tally(classes: Tensor, n: int, weights: Tensor | None = None) -> Tensor:
    """[n] how often each class below n occurs in `classes` [E], or the sum of its `weights`, float64.

    bincount is the fastest on a CPU; on a GPU it makes the host wait for the largest class.

    >>> tally(torch.tensor([2, 0, 2]), 4).tolist()
    [1, 0, 2, 0]
    """
    if classes.is_cpu:
        return torch.bincount(classes, weights, n)
    weights = torch.ones_like(classes) if weights is None else weights
    return weights.new_zeros(n).index_add_(0, classes, weights)


class Firing:
    """Firings, summed, squared and largest activations of each latent of one prefix, on the entries' device."""

    def __init__(self, n_latents: int, device: torch.device | str = "cpu") -> None:
        self.rows = 0
        self.firings = torch.zeros(n_latents, dtype=torch.int64, device=device)
        self.summed, self.squared = torch.zeros(2, n_latents, dtype=torch.float64, device=device)
        self.largest = torch.zeros(n_latents, device=device)

    def add(self, entries: Entries) -> None:
        """A block's active entries."""
        latents, values = entries.latents, entries.values.float()
        self.rows += entries.n_rows
        self.firings += tally(latents, len(self.firings))
        self.summed.index_add_(0, latents, values.double())
        self.squared.index_add_(0, latents, values.double().square())
        self.largest.scatter_reduce_(0, latents, values, "amax")

    def merge(self, peers: Processes) -> None:
        """Add the rows of all processes."""
        self.rows = peers.count(self.rows)
        for summed in (self.firings, self.summed, self.squared):
            peers.total(summed)
        peers.largest(self.largest)

    @property
    def density(self) -> Tensor:
        """[F] float64, share of the rows on which a latent is active."""
        return self.firings.double() / self.rows

    @property
    def mean(self) -> Tensor:
        """[F] float64, mean activation over the rows on which a latent fires; 0 for a dead one."""
        return self.summed / self.firings.clamp_min(1)

    @property
    def dead_fraction(self) -> float:
        """Share of the latents that never fired on the `rows` rows."""
        return float((self.firings == 0).double().mean())

    def result(self) -> FiringMetrics:
        """Densities are of living latents."""
        alive = self.firings > 0
        density = self.density[alive]
        logs = np.log10(density.cpu().numpy()).clip(DENSITY_BINS[0])
        histogram, _ = np.histogram(logs, bins=DENSITY_BINS)
        return FiringMetrics(
            rows=self.rows,
            n=len(alive),
            dead=int((~alive).sum()),
            alive=int(alive.sum()),
            over_1_percent=int((density > 0.01).sum()),
            over_10_percent=int((density > FREQUENT).sum()),
            median_density=float(density.median()) if alive.any() else None,
            largest_activation=float(self.largest.max()),
            mean_activation=float(self.summed.sum() / self.firings.sum()) if alive.any() else None,
            log10_density_edges=DENSITY_BINS.tolist(),
            log10_density_histogram=histogram.tolist(),
        )

"""How well outputs are reconstructed, and from how many active latents: streaming, in float64.

Shapes: B rows of a block, D output width, F latents. Accumulators hold no rows: memory does not grow with them. They
are on the device of what they add up, so that the host does not wait for a block's numbers.
The outputs' own deviation from their mean, the denominator of FVU, is transcoder/fvu.py's.
"""

import numpy as np
import torch
from torch import Tensor

from common.processes import Processes
from evaluate.metrics.firing import tally
from evaluate.records import ReconstructionMetrics, SparsityMetrics
from transcoder.entries import Entries
from transcoder.fvu import ratio


class Reconstruction:
    """Errors of one reconstruction y_hat of y.

    fvu = sum ||y - y_hat||^2 / sum ||y - mean(y)||^2, mse and mae are means over rows and dimensions
    (units of the activations, squared for mse), cosine is the mean over rows of cos(y, y_hat), 0 for a
    row where either is zero, relative_bias = E||y_hat||^2 / E<y, y_hat>: 1 for a least-squares fit,
    below 1 where the reconstruction shrinks.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.rows = 0
        self.width = width
        self.squared = torch.zeros(width, dtype=torch.float64, device=device)
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)
        """Of |y - y_hat|, of cosines, of ||y_hat||^2, of <y, y_hat>."""

    def add(self, y: Tensor, y_hat: Tensor) -> Tensor:
        """`y`, `y_hat` [B, D]; returns the squared error of each row, [B] float64."""
        y, y_hat = y.double(), y_hat.double()
        error = y_hat - y
        squared = error.square()
        cross = (y * y_hat).sum(1)
        norms = y.norm(dim=1) * y_hat.norm(dim=1)
        self.rows += len(y)
        self.squared += squared.sum(0)
        cosines = torch.where(norms > 0, cross / norms.clamp_min(1e-300), 0.0)
        self.sums += torch.stack([error.abs().sum(), cosines.sum(), y_hat.square().sum(), cross.sum()])
        return squared.sum(1)

    def merge(self, peers: Processes) -> None:
        """Add the rows of all processes."""
        self.rows = peers.count(self.rows)
        peers.total(self.squared)
        peers.total(self.sums)

    def result(self, deviation: float) -> ReconstructionMetrics:
        """`deviation`: sum ||y - mean(y)||^2 over the same rows."""
        values = self.rows * self.width
        error = float(self.squared.sum())
        absolute, cosines, self_product, cross_product = self.sums.tolist()
        return ReconstructionMetrics(
            fvu=ratio(error, deviation),
            mse=error / values,
            mae=absolute / values,
            cosine=cosines / self.rows,
            relative_bias=ratio(self_product, cross_product),
        )


class Sparsity:
    """Active latents per row (L0) as an exact histogram, and the mean of summed activations (L1)."""

    def __init__(self, n_latents: int, device: torch.device | str = "cpu") -> None:
        self.counts = torch.zeros(n_latents + 1, dtype=torch.int64, device=device)
        """[F + 1] rows by their number of active latents."""
        self.summed = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, entries: Entries) -> None:
        """A block's active entries."""
        self.counts += tally(entries.l0(), len(self.counts))
        self.summed += entries.values.double().sum()

    def merge(self, peers: Processes) -> None:
        """Add the rows of all processes."""
        peers.total(self.counts)
        peers.total(self.summed)

    def result(self) -> SparsityMetrics:
        """Latents per row; l1 in units of the activations."""
        counts = np.trim_zeros(self.counts.cpu().numpy(), "b")
        rows = int(counts.sum())
        levels = np.arange(len(counts))
        mean = float(counts @ levels) / rows
        variance = float(counts @ (levels - mean) ** 2) / rows
        return SparsityMetrics(
            l0=mean,
            l0_median=_median(counts),
            l0_std=variance**0.5,
            l0_histogram=counts.tolist(),
            l1=float(self.summed) / rows,
        )


def _median(counts: np.ndarray) -> float:
    """The middle L0 of [.] rows by their L0; with an even number of rows the mean of the two middle ones."""
    rows = int(counts.sum())
    upto = np.cumsum(counts)
    low, high = np.searchsorted(upto, [(rows - 1) // 2, rows // 2], side="right")
    return float(low + high) / 2

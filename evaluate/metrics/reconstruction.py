"""How well outputs are reconstructed, and from how many active latents: streaming, in float64.

Shapes: B rows of a block, D output width. Accumulators hold no rows: memory does not grow with them.
The outputs' own deviation from their mean, the denominator of FVU, is transcoder/fvu.py's.
"""

import numpy as np
import torch
from torch import Tensor

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

    def __init__(self, width: int) -> None:
        self.rows = 0
        self.width = width
        self.squared = torch.zeros(width, dtype=torch.float64)
        self.absolute = self.cosines = self.self_product = self.cross_product = 0.0

    def add(self, y: Tensor, y_hat: Tensor) -> Tensor:
        """`y`, `y_hat` [B, D]; returns the squared error of each row, [B] float64."""
        y, y_hat = y.double(), y_hat.double()
        error = y_hat - y
        squared = error.square()
        cross = (y * y_hat).sum(1)
        norms = y.norm(dim=1) * y_hat.norm(dim=1)
        self.rows += len(y)
        self.squared += squared.sum(0).cpu()
        self.absolute += float(error.abs().sum())
        self.cosines += float(torch.where(norms > 0, cross / norms.clamp_min(1e-300), 0.0).sum())
        self.self_product += float(y_hat.square().sum())
        self.cross_product += float(cross.sum())
        return squared.sum(1).cpu()

    def result(self, deviation: float) -> ReconstructionMetrics:
        """`deviation`: sum ||y - mean(y)||^2 over the same rows."""
        values = self.rows * self.width
        error = float(self.squared.sum())
        return ReconstructionMetrics(
            fvu=ratio(error, deviation),
            mse=error / values,
            mae=self.absolute / values,
            cosine=self.cosines / self.rows,
            relative_bias=ratio(self.self_product, self.cross_product),
        )


class Sparsity:
    """Active latents per row (L0) as an exact histogram, and the mean of summed activations (L1)."""

    def __init__(self) -> None:
        self.counts = np.zeros(1, dtype=np.int64)
        self.summed = 0.0

    def add(self, entries: Entries) -> None:
        """A block's active entries."""
        counts = np.bincount(entries.l0().cpu().numpy(), minlength=len(self.counts))
        counts[: len(self.counts)] += self.counts
        self.counts = counts
        self.summed += float(entries.values.double().sum())

    def result(self) -> SparsityMetrics:
        """Latents per row; l1 in units of the activations."""
        rows = int(self.counts.sum())
        levels = np.arange(len(self.counts))
        mean = float(self.counts @ levels) / rows
        variance = float(self.counts @ (levels - mean) ** 2) / rows
        return SparsityMetrics(
            l0=mean,
            l0_median=self.median(),
            l0_std=variance**0.5,
            l0_histogram=self.counts.tolist(),
            l1=self.summed / rows,
        )

    def median(self) -> float:
        """The middle L0; with an even number of rows the mean of the two middle ones."""
        rows = int(self.counts.sum())
        upto = np.cumsum(self.counts)
        low, high = np.searchsorted(upto, [(rows - 1) // 2, rows // 2], side="right")
        return float(low + high) / 2

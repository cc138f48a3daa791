"""The fraction of variance unexplained (FVU), streaming, in float64.

fvu = sum ||y - y_hat||^2 / sum ||y - mean(y)||^2 over the same rows, with the rows' own mean.
Shapes: B rows of a block, D output width. Accumulators hold no rows: memory does not grow with them.
"""

import torch
from torch import Tensor

from common.processes import Processes


def ratio(numerator: float, denominator: float) -> float | None:
    """None where there is nothing to compare with: never infinity, never a guess."""
    return numerator / denominator if denominator > 0 else None


class Deviation:
    """Sum of squared deviations from the per-dimension mean, merged block by block.

    Chan's update instead of sum(y^2) - n mean^2: the difference of two large sums would leave noise
    where a dimension is constant, and the FVU of a constant output must be null.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.rows = 0
        self.mean, self.squares = torch.zeros(2, width, dtype=torch.float64, device=device)

    def add(self, values: Tensor) -> None:
        """`values` [B, D], B at least 1, of any device; the host waits only where the sums are on another."""
        block = values.double()
        mean = block.mean(0)
        squares = (block - mean).square_().sum(0).to(self.mean.device)
        self._join(len(block), mean.to(self.mean.device), squares)

    def _join(self, rows: int, mean: Tensor, squares: Tensor) -> None:
        """Add rows of this mean [D] and sum of squared deviations from it [D]."""
        total = self.rows + rows
        shift = mean - self.mean
        self.squares += squares + shift.square() * (self.rows * rows / total)
        self.mean += shift * (rows / total)
        self.rows = total

    def merge(self, peers: Processes) -> None:
        """Add the rows of all processes, in order of rank."""
        if peers.world == 1:
            return
        rows = peers.gathered(torch.tensor([self.rows], device=self.mean.device)).tolist()
        means, squares = (peers.stacked(each) for each in (self.mean, self.squares))
        self.rows = 0
        self.mean, self.squares = torch.zeros_like(self.mean), torch.zeros_like(self.squares)
        for own, mean, square in zip(rows, means, squares, strict=True):
            if own:
                self._join(own, mean, square)

    @property
    def total(self) -> float:
        """sum over rows and dimensions of (y - mean)^2."""
        return float(self.squares.sum())

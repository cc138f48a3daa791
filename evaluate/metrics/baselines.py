"""What any transcoder must beat: the mean, and the best linear map from input to output.

Shapes: N rows, D_in, D_out widths. Fitted on train rows, measured on the evaluated ones.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from common.processes import ALONE, Processes
from evaluate.metrics.reconstruction import Reconstruction
from evaluate.metrics.rows import Split, batches, blocks
from evaluate.records import BaselineMetrics, FittedMetrics, LinearMetrics, OneGroupMetrics

CPU = torch.device("cpu")
FIT_ROWS = 65_536
PENALTIES = (1e-6, 1e-4, 1e-2, 1e-1)
"""Ridge penalties tried, relative to the mean squared input."""


@dataclass(frozen=True)
class LinearMap:
    """y_hat = mean_out + (x - mean_in) W."""

    mean_in: Tensor
    mean_out: Tensor
    W: Tensor
    """[D_in, D_out]"""
    penalty: float
    rows: int

    def __call__(self, inputs: Tensor) -> Tensor:
        return torch.addmm(self.mean_out, inputs - self.mean_in, self.W)


def fit_ridge(
    split: Split, n_rows: int = FIT_ROWS, device: torch.device = CPU, peers: Processes = ALONE
) -> LinearMap:
    """argmin_W sum ||y - mean(y) - (x - mean(x)) W||^2 + penalty * N * E[x_j^2] * ||W||^2.

    Fitted on the first rows of `split`; the last fifth of them chooses the penalty and is not fitted. The map is on
    the device that it was fitted on. With `peers` each process reads a part of the rows; all have the same map.
    """
    n_rows = min(n_rows, len(split))
    n_fit = max(1, n_rows - n_rows // 5)
    mean_in, mean_out = _means(split, n_fit, device, peers)
    gram, cross = _products(split, n_fit, mean_in, mean_out, peers)
    scale = float(gram.diagonal().mean()) or 1.0
    eye = torch.eye(len(gram), dtype=gram.dtype, device=device)
    maps = [
        LinearMap(
            mean_in,
            mean_out,
            torch.linalg.solve(gram + penalty * scale * eye, cross).float(),
            penalty,
            n_fit,
        )
        for penalty in PENALTIES
    ]
    if n_fit == n_rows:
        return maps[-1]
    errors = torch.zeros(len(maps), dtype=torch.float64, device=device)
    rest = ((n_fit + start, n_fit + stop) for start, stop in blocks(n_rows - n_fit, peers))
    for _, _, x, y in batches(split, rest, device):
        errors += torch.stack([(linear_map(x) - y).double().square().sum() for linear_map in maps])
    return maps[int(peers.total(errors).argmin())]


def _means(split: Split, n_rows: int, device: torch.device, peers: Processes) -> tuple[Tensor, Tensor]:
    sums = [side.new_zeros(side.shape[1], dtype=torch.float64, device=device) for side in split.rows(0, 1)]
    for _, _, *values in batches(split, blocks(n_rows, peers), device):
        for old, new in zip(sums, values, strict=True):
            old += new.double().sum(0)
    inputs, outputs = (peers.total(each) / n_rows for each in sums)
    return inputs.float(), outputs.float()


def _products(
    split: Split, n_rows: int, mean_in: Tensor, mean_out: Tensor, peers: Processes
) -> tuple[Tensor, Tensor]:
    """(x^T x [D_in, D_in], x^T y [D_in, D_out]) of centred rows: float32 products, float64 sums."""
    gram = mean_in.new_zeros(len(mean_in), len(mean_in), dtype=torch.float64)
    cross = mean_in.new_zeros(len(mean_in), len(mean_out), dtype=torch.float64)
    for _, _, x, y in batches(split, blocks(n_rows, peers), mean_in.device):
        x, y = x - mean_in, y - mean_out
        gram += x.T @ x
        cross += x.T @ y
    return peers.total(gram), peers.total(cross)


class Baselines:
    """Errors of the mean of the train rows and of a linear map fitted on them.

    Where the train rows were removed there is no map, and the errors are those that were measured `before`, if any.
    """

    def __init__(self, linear: LinearMap | None, before: BaselineMetrics | None = None) -> None:
        width, device = (0, "cpu") if linear is None else (len(linear.mean_out), linear.W.device)
        self.linear, self._before = linear, before
        self.of_mean, self.of_linear = Reconstruction(width, device), Reconstruction(width, device)

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """A block of rows on the map's device: `inputs` [B, D_in], `outputs` [B, D_out]."""
        if self.linear is None:
            return
        self.of_mean.add(outputs, self.linear.mean_out.expand_as(outputs))
        self.of_linear.add(outputs, self.linear(inputs))

    def merge(self, peers: Processes) -> None:
        """Add the rows of all processes."""
        for own in (self.of_mean, self.of_linear):
            own.merge(peers)

    def result(self, deviation: float, one_group: OneGroupMetrics | None = None) -> BaselineMetrics:
        """`deviation`: sum ||y - mean(y)||^2 over the same rows; `one_group`: a run without nesting, if any."""
        if (fit := self.linear) is None:
            mean, linear = (self._before.mean, self._before.linear) if self._before else (None, None)
        else:
            mean = FittedMetrics(**dict(self.of_mean.result(deviation)), fit_rows=fit.rows)
            linear = LinearMetrics(
                **dict(self.of_linear.result(deviation)), fit_rows=fit.rows, penalty=fit.penalty
            )
        if one_group is None:
            return BaselineMetrics(mean=mean, linear=linear)
        return BaselineMetrics(mean=mean, linear=linear, one_group=one_group)

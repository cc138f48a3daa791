"""Where the reconstruction error is: by token, position in the context, distance from the mean output, dimension.

Shapes: B rows of a block, G prefixes, V token ids, T positions, D output width. For every class of rows
the share of the total squared error, and the FVU within it: error over squared deviations from the
split's mean output, so that the shares of all classes add up to the whole.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from common.processes import Processes
from evaluate.records import ErrorClass, ErrorMetrics, TokenError
from transcoder.fvu import ratio
from transcoder.heavy import Typical

N_TOKENS = 40
N_DIMENSIONS = 20
N_POSITION_BINS = 32
SIZE_BINS = np.linspace(-4, 4, 17)
"""Edges of log2(||y - mean|| / root mean square of it): half-octaves."""


class Table:
    """Rows, squared deviations and each prefix's squared error, by class of row."""

    def __init__(self, n_classes: int, n_prefixes: int) -> None:
        self.rows = np.zeros(n_classes, np.int64)
        self.deviation = np.zeros(n_classes)
        self.errors = np.zeros((n_prefixes, n_classes))

    def add(self, classes: np.ndarray, deviation: np.ndarray, errors: Sequence[np.ndarray]) -> None:
        """`classes` [B] int64, `deviation` [B], `errors` G times [B]."""
        n = len(self.rows)
        self.rows += np.bincount(classes, minlength=n)
        self.deviation += np.bincount(classes, weights=deviation, minlength=n)
        for total, own in zip(self.errors, errors, strict=True):
            total += np.bincount(classes, weights=own, minlength=n)

    def merge(self, peers: Processes) -> None:
        """Add the rows of all processes."""
        peers.add(self.rows, self.deviation, self.errors)

    def lines(self, classes: np.ndarray) -> list[ErrorClass]:
        """One record for each of `classes`."""
        whole = self.errors.sum(1)
        return [
            ErrorClass(
                class_=int(c),
                rows=int(self.rows[c]),
                error_share=ratio(float(self.errors[-1, c]), float(whole[-1])),
                fvu=[ratio(float(own[c]), float(self.deviation[c])) for own in self.errors],
            )
            for c in classes
        ]

    def largest(self, n: int) -> list[ErrorClass]:
        """The classes with most of the full transcoder's error, largest first."""
        order = np.argsort(-self.errors[-1], kind="stable")[:n]
        return self.lines(order[self.rows[order] > 0])


class ErrorMap:
    """`mean` [D] and `variance` (summed over D) are the split's own, from the store's manifest; `typical`: tells heavy
    rows, of which the FVU of all rows may be made up."""

    def __init__(
        self,
        mean: np.ndarray,
        variance: float,
        typical: Typical,
        n_prefixes: int,
        vocabulary: int,
        positions: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.typical = typical.to(device)
        self.by_weight = Table(2, n_prefixes)
        self.mean = torch.from_numpy(mean).to(device)
        self.scale = variance**0.5
        self.positions = positions
        self.bins = min(N_POSITION_BINS, positions)
        self.by_token = Table(vocabulary, n_prefixes)
        self.by_position = Table(self.bins, n_prefixes)
        self.by_size = Table(len(SIZE_BINS) - 1, n_prefixes)

    def add(self, y: Tensor, errors: Tensor, tokens: np.ndarray, positions: np.ndarray) -> None:
        """`y` [B, D] outputs, `errors` [G, B] squared error of each row, on one device; `tokens`, `positions` [B]."""
        deviation, distances, heavy, *own = self._of_rows(y, errors)
        size = np.log2(np.maximum(np.sqrt(deviation), 1e-300) / max(self.scale, 1e-300))
        size_bin = np.clip(np.searchsorted(SIZE_BINS, size, side="right") - 1, 0, len(SIZE_BINS) - 2)
        self.by_token.add(tokens.astype(np.int64), deviation, own)
        self.by_position.add(positions.astype(np.int64) * self.bins // self.positions, deviation, own)
        self.by_size.add(size_bin, deviation, own)
        self.by_weight.add(heavy.astype(np.int64), distances, own)

    def merge(self, peers: Processes) -> None:
        """Add the rows of all processes."""
        for table in (self.by_token, self.by_position, self.by_size, self.by_weight):
            table.merge(peers)

    def _of_rows(self, y: Tensor, errors: Tensor) -> np.ndarray:
        """[3 + G, B] float64: squared deviation from the mean, from the typical mean, whether heavy, errors."""
        deviation = (y.double() - self.mean).square().sum(1)
        distances = self.typical.distances(y)
        heavy = distances > self.typical.limit
        rows = torch.stack([deviation, distances.double(), heavy.double(), *errors])
        return rows.cpu().numpy()  # sync: the only copy of a block

    def result(self, squared: list[Tensor], squares: Tensor, label: Callable[[int], str]) -> ErrorMetrics:
        """`squared`: per prefix the squared error of each dimension [D]; `squares` [D] deviations; `label`: a
        token's text."""
        dimensions = Table(len(squares), len(squared))
        dimensions.rows += 1
        dimensions.deviation += squares.cpu().numpy()
        dimensions.errors += torch.stack(squared).cpu().numpy()
        edges = [-(-p * self.positions // self.bins) for p in range(self.bins + 1)]
        tokens = self.by_token.largest(N_TOKENS)
        typical, heavy = self.by_weight.lines(np.arange(2))
        return ErrorMetrics(
            typical=typical,
            heavy=heavy if heavy.rows else None,
            heavy_variance=ratio(float(self.by_weight.deviation[1]), float(self.by_weight.deviation.sum())),
            by_token=[TokenError(**dict(each), token=label(each.class_)) for each in tokens],
            by_position=self.by_position.lines(np.flatnonzero(self.by_position.rows)),
            position_edges=edges,
            by_size=self.by_size.lines(np.flatnonzero(self.by_size.rows)),
            size_edges=SIZE_BINS.tolist(),
            by_dimension=dimensions.largest(N_DIMENSIONS),
        )

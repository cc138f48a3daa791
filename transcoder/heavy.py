"""Heavy rows: the few whose outputs lie far from all others.

Language models have massive activations (Sun et al. 2024, arXiv:2402.17762): in SmolLM2-135M's layer 11 nine rows of
8,000 hold 98.6 % of the outputs' variance, nearly all of it in one row. The mean squared error then measures little
else: a transcoder with an FVU of 0.02 was worse than the mean output on the other rows. So training gives heavy rows
less weight, and measurements give the FVU without them too.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from shards.manifest import Moments

HEAVY = 100.0
"""A row is heavy if its squared distance from the mean output is more than this many times the median's: it is ten
times as far from it. Seven of SmolLM2-135M's 30 layers have some, none of the three of Gemma-3-270M (docs/log.md)."""
OF_MOMENTS = 1.25
"""The variance of all rows is exact, and used unless it is more than this many times the sample's with heavy rows cut.
Without heavy rows the two differ by at most 2 %; of the layers where the cut changes it by more than that, heavy rows
add 9 % (layer 1) to 3,500 % (layer 11)."""
SAMPLE = 8192
BLOCKS = 8
"""The sample is this many runs of consecutive rows, evenly spaced over the split."""
CENTRE = 512
"""Number of rows whose median in each dimension is the first centre: heavy rows move a mean, but not a median."""


@runtime_checkable
class Rows(Protocol):
    """The part of a store's split that is needed here."""

    def __len__(self) -> int: ...

    def rows(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Rows [start, stop) as (inputs [n, D_in], outputs [n, D_out])."""
        ...


@dataclass(frozen=True, eq=False)
class Typical:
    """What the outputs of most rows of a split are like, by a sample of its rows."""

    mean: Float[Tensor, " D_out"]
    """Of all rows, or of those that are not heavy."""
    limit: float
    """Squared distance from the mean above which a row is heavy."""
    variance: float
    """Mean squared distance from the mean, summed over dimensions; a heavy row counts as one at the limit."""

    def to(self, device: torch.device | str) -> "Typical":
        """The same with the mean on a device."""
        return Typical(self.mean.to(device), self.limit, self.variance)

    def distances(self, outputs: Float[Tensor, "B D_out"]) -> Float[Tensor, " B"]:
        """Squared distance of each row from the mean."""
        return (outputs - self.mean).square_().sum(1)

    def weights(self, outputs: Float[Tensor, "B D_out"]) -> Float[Tensor, " B"] | None:
        """min(1, limit / distance) of each row: a heavy row counts as one at the limit. None where all are 1.

        On a GPU it is never None, because finding out would make the host wait for the device.
        """
        distances = self.distances(outputs)
        if distances.is_cpu and bool((distances <= self.limit).all()):
            return None
        return (self.limit / distances).clamp_(max=1.0)


def typical_rows(split: Rows, moments: Moments) -> Typical:
    """`moments`: of the outputs of all rows. Reads at most SAMPLE rows; the split has some."""
    outputs, mean = _sample(split), torch.tensor(moments.mean, dtype=torch.float32)
    centre = outputs[:: -(-len(outputs) // CENTRE)].median(0).values
    distances = (outputs - centre).square_().sum(1)
    limit, exact = _limit(distances), float(moments.variance.sum())
    if limit == torch.inf:
        return Typical(mean, limit, exact)
    kept = distances <= limit
    if not kept.all():
        mean = outputs[kept].mean(0)
    distances = (outputs - mean).square_().sum(1)
    limit = _limit(distances)
    variance = float(distances.double().clamp(max=limit).mean())
    return Typical(mean, limit, variance if exact > OF_MOMENTS * variance else exact)


def _limit(distances: Tensor) -> float:
    """HEAVY times the median; infinity if that is 0, because at least half of the rows equal the centre."""
    median = float(distances.median())
    return HEAVY * median if median > 0 else torch.inf


def _sample(split: Rows) -> Float[Tensor, "n D_out"]:
    n = len(split)
    if n <= SAMPLE:
        return split.rows(0, n)[1]
    size = SAMPLE // BLOCKS
    starts = [block * (n - size) // (BLOCKS - 1) for block in range(BLOCKS)]
    return torch.cat([split.rows(start, start + size)[1] for start in starts])

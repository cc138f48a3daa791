"""Several transcoders in one pass over the same rows: every prefix of each, and its differences to one of them."""

from bisect import bisect
from collections.abc import Iterator, Sequence
from math import log
from typing import NamedTuple

import numpy as np
import torch

from common.numbers import MARK
from common.progress import progress
from evaluate.comparison.records import ComparedPrefix, Differences, EqualL0
from evaluate.metrics.baselines import Baselines
from evaluate.metrics.error_map import Table
from evaluate.metrics.measure import Measurement
from evaluate.metrics.redundancy import decoder_similarity
from evaluate.metrics.rows import batches, blocks
from evaluate.records import AblationLosses, PrefixMetrics
from shards.store import StoreSplit
from transcoder import Transcoder
from transcoder.heavy import Typical


class Column(NamedTuple):
    """A number that is compared."""

    title: str
    spec: str
    """Its format, with aligned decimals."""
    better: int
    """1: more is better, -1: less is, 0: neither."""
    scale: float = 1
    """What it is shown times: 100 for a percentage."""


COLUMNS = {
    "fvu": Column("FVU", ".3f", -1),
    "fvu_typical": Column(f"FVU without heavy rows{MARK}", ".3f", -1),
    "l0": Column("L0", ".1f", 0),
    "recovered_zero": Column("CE recovered %", ".1f", 1, 100),
    "kl": Column("KL (nats)", ".4f", -1),
    "cosine": Column("cosine", ".3f", 1),
    "mse": Column("MSE", ".3g", -1),
    "relative_bias": Column("bias", ".3f", 0),
    "dead_fraction": Column("dead %", ".1f", -1, 100),
    "redundancy": Column("redundancy %", ".2f", -1, 100),
}
"""Of `Differences`."""
LANGUAGE = {"recovered_zero", "kl"}
"""Those of `COLUMNS` that are from an evaluation, where there is one."""


class Measured(NamedTuple):
    """A prefix of one of the transcoders."""

    transcoder: str
    prefix: int
    metrics: PrefixMetrics
    redundancy: float | None
    losses: AblationLosses | None = None
    """Beside which the metrics' cross-entropy stands."""
    typical: float | None = None
    """Its FVU without heavy rows, where there are some."""

    @property
    def numbers(self) -> dict[str, float | None]:
        """What is compared, by its key in `COLUMNS`."""
        language = self.metrics.cross_entropy
        own = {"redundancy": self.redundancy, "fvu_typical": self.typical}
        own |= {key: getattr(language, key, None) for key in LANGUAGE}
        return {key: own[key] if key in own else getattr(self.metrics, key) for key in COLUMNS}

    @property
    def judged(self) -> float | None:
        """The FVU by which transcoders are compared: without heavy rows, where there are some."""
        return self.metrics.fvu if self.typical is None else self.typical

    def less(self, other: "Measured") -> Differences:
        """Its numbers less the other's."""
        mine, theirs = self.numbers, other.numbers
        if self.losses and other.losses and self.losses.positions != other.losses.positions:
            mine |= dict.fromkeys(LANGUAGE)
        return Differences(**{key: _less(mine[key], theirs[key]) for key in COLUMNS})


def _less(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


@torch.inference_mode()
def side_by_side(
    coders: dict[str, Transcoder], split: StoreSplit, n_rows: int, baselines: Baselines, typical: Typical
) -> tuple[list[Measured], float | None, int]:
    """One pass: every coder's prefixes, the FVU of the best linear map, and how many rows are heavy by `typical`.

    The coders and the baselines' map are on one device.
    """
    by_weight = {name: Table(2, len(coder.prefix_ends)) for name, coder in coders.items()}
    measurements = {name: Measurement(coder, select=None) for name, coder in coders.items()}
    device = next(iter(coders.values())).W_dec.device
    typical = typical.to(device)
    with progress("compare", n_rows, "rows") as bar:
        for start, stop, inputs, outputs in batches(split, blocks(n_rows), device):
            baselines.add(inputs, outputs)
            distances = typical.distances(outputs)
            told = [distances.double(), (distances > typical.limit).double()]
            for measurement in measurements.values():
                told += measurement.add(inputs, outputs)[1]
            of_rows, heavy, *errors = torch.stack(told).cpu().numpy()  # sync: the only copy of a block
            for table, measurement in zip(by_weight.values(), measurements.values(), strict=True):
                own, errors = errors[: len(measurement.prefixes)], errors[len(measurement.prefixes) :]
                table.add(heavy.astype(np.int64), of_rows, own)
            bar.update(stop - start)
    lines: list[Measured] = []
    for name, measurement in measurements.items():
        redundancy, _ = decoder_similarity(coders[name].W_dec, coders[name].prefix_ends, n_neighbours=0)
        both = zip(measurement.result(), redundancy.prefixes, strict=True)
        light, heavy_ones = by_weight[name].lines(np.arange(2))
        fvu = light.fvu if heavy_ones.rows else [None] * len(light.fvu)
        lines += [
            Measured(name, g, prefix, pairs.share, typical=fvu[g]) for g, (prefix, pairs) in enumerate(both)
        ]
    deviation = next(iter(measurements.values())).deviation.total
    linear = baselines.result(deviation).linear
    return lines, linear and linear.fvu, int(next(iter(by_weight.values())).rows[1])


def line_of(one: Measured, run: Sequence[Measured]) -> ComparedPrefix:
    """A prefix as compare.json has it; `run`: the prefixes of the run that all are compared with."""
    alike = [each for each in run if each.metrics.end == one.metrics.end]
    own = one.transcoder == run[0].transcoder
    return ComparedPrefix(
        transcoder=one.transcoder,
        prefix=one.prefix,
        **dict(one.metrics),
        fvu_typical=one.typical,
        redundancy=one.redundancy,
        difference=one.less(run[-1]),
        equal_latents=None if own or not alike else one.less(alike[0]),
    )


BEYOND = 1.05
"""Times L0, how far the lines go on beyond the first and the last prefix: runs of one k seldom have the same L0."""


def fvu_at(points: Sequence[tuple[float, float | None]], l0: float) -> float | None:
    """FVU at `l0`, on straight lines in log L0 through a transcoder's (L0, FVU); None further than 5 % beyond them.

    A point of no L0 or no FVU is none. Of points with one L0 the last counts, which is the widest prefix.

    >>> round(fvu_at([(4, 0.5), (16, 0.3)], 8), 3)
    0.4
    >>> fvu_at([(4, 0.5), (16, 0.3)], 17)
    """
    known = dict(sorted((x, y) for x, y in dict(points).items() if x > 0 and y is not None))
    if l0 in known:  # exactly: the logarithm would round it
        return known[l0]
    xs = [*known]
    if len(xs) < 2 or not xs[0] / BEYOND <= l0 <= xs[-1] * BEYOND:
        return None
    a = min(max(0, bisect(xs, l0) - 1), len(xs) - 2)
    (x, y), (x2, y2) = (xs[a], known[xs[a]]), (xs[a + 1], known[xs[a + 1]])
    return y + (y2 - y) * log(l0 / x) / log(x2 / x)


def equal_l0(run: Sequence[Measured], other: Sequence[Measured]) -> Iterator[EqualL0]:
    """Both transcoders at the L0 of every prefix of either, where both have one; by L0, each once."""

    def points(lines: Sequence[Measured]) -> list[tuple[float, float | None]]:
        return [(line.metrics.l0, line.judged) for line in lines]

    places = {line.metrics.l0: line for line in (*other, *run)}  # of one L0: the run's
    for l0, line in sorted(places.items()):
        mine, theirs = fvu_at(points(run), l0), fvu_at(points(other), l0)
        if mine is not None and theirs is not None:
            yield EqualL0(
                transcoder=line.transcoder,
                prefix=line.prefix,
                other=other[0].transcoder,
                l0=l0,
                run_fvu=mine,
                fvu=theirs,
                difference=theirs - mine,
            )

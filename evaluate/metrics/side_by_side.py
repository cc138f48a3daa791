"""Several transcoders in one pass over the same rows: every prefix of each, and its differences to one of them."""

from typing import NamedTuple

import torch

from common.progress import progress
from evaluate.metrics.baselines import Baselines
from evaluate.metrics.measure import Measurement
from evaluate.metrics.redundancy import decoder_similarity
from evaluate.metrics.rows import blocks
from evaluate.records import ComparedPrefix, Differences, PrefixMetrics
from shards.store import StoreSplit
from transcoder import Transcoder

COLUMNS = {
    "fvu": "FVU",
    "l0": "L0",
    "cosine": "cosine",
    "mse": "MSE",
    "relative_bias": "bias",
    "dead_fraction": "dead share",
    "redundancy": "redundancy",
}
"""Of `Differences`, with their titles in the table."""


class Measured(NamedTuple):
    """A prefix of one of the transcoders."""

    transcoder: str
    prefix: int
    metrics: PrefixMetrics
    redundancy: float | None

    @property
    def numbers(self) -> dict[str, float | None]:
        """What is compared, by its key in `COLUMNS`."""
        return {
            key: self.redundancy if key == "redundancy" else getattr(self.metrics, key) for key in COLUMNS
        }


@torch.inference_mode()
def side_by_side(
    coders: dict[str, Transcoder], split: StoreSplit, n_rows: int, baselines: Baselines
) -> tuple[list[Measured], float | None]:
    """One pass: every coder's prefixes, and the FVU of the best linear map."""
    measurements = {name: Measurement(coder, select=None) for name, coder in coders.items()}
    with progress("compare", n_rows, "rows") as bar:
        for start, stop in blocks(n_rows):
            inputs, outputs = split.rows(start, stop)
            baselines.add(inputs, outputs)
            for measurement in measurements.values():
                device = measurement.coder.W_dec.device
                measurement.add(inputs.to(device), outputs.to(device))
            bar.update(stop - start)
    lines: list[Measured] = []
    for name, measurement in measurements.items():
        redundancy, _ = decoder_similarity(coders[name].W_dec, coders[name].prefix_ends, n_neighbours=0)
        both = zip(measurement.result(), redundancy.prefixes, strict=True)
        lines += [Measured(name, g, prefix, pairs.share) for g, (prefix, pairs) in enumerate(both)]
    deviation = next(iter(measurements.values())).deviation.total
    linear = baselines.result(deviation).linear
    return lines, linear and linear.fvu


def line_of(one: Measured, reference: Measured) -> ComparedPrefix:
    """A prefix as compare.json has it."""
    pairs = {key: (value, reference.numbers[key]) for key, value in one.numbers.items()}
    differences = {key: None if a is None or b is None else a - b for key, (a, b) in pairs.items()}
    return ComparedPrefix(
        transcoder=one.transcoder,
        prefix=one.prefix,
        **dict(one.metrics),
        redundancy=one.redundancy,
        difference=Differences(**differences),
    )

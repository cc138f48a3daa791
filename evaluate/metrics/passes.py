"""The two passes over the rows: statistics and sampled rows, then what is around the samples.

Shapes: B rows of a block, F latents, G prefixes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from common.processes import ALONE, Processes
from evaluate.labels.measured import Measured
from evaluate.metrics.baselines import Baselines
from evaluate.metrics.coactivation import Coactivation
from evaluate.metrics.contexts import (
    N_EVEN,
    N_LABEL,
    N_TOP,
    Best,
    Samples,
    Shader,
    choose,
    lottery,
    on_device,
    strength,
)
from evaluate.metrics.error_map import ErrorMap
from evaluate.metrics.measure import Measurement, Select
from evaluate.metrics.rows import TextSplit, batches, blocks, own_rows
from evaluate.records import ErrorMetrics
from shards.manifest import Moments
from shards.text.tokens import tokens_at
from transcoder import Transcoder
from transcoder.heavy import typical_rows

Tick = Callable[[int], object]


@dataclass
class First:
    """What the first pass leaves."""

    measurement: Measurement
    baselines: Baselines
    error_map: ErrorMap
    coactivation: Coactivation
    top: Best
    even: Best
    """The first of `sampled`, once the pass is over."""
    sampled: Best
    """What labels are chosen on."""

    def merge(self, peers: Processes) -> None:
        """Add the rows of all processes."""
        peers.wait()
        for own in (
            self.measurement,
            self.baselines,
            self.error_map,
            self.coactivation,
            self.top,
            self.sampled,
        ):
            own.merge(peers)

    def errors(self, label: Callable[[int], str]) -> ErrorMetrics:
        """Where the error is; `label`: a token's text."""
        squared = [prefix.error.squared for prefix in self.measurement.prefixes]
        return self.error_map.result(squared, self.measurement.deviation.squares, label)


@torch.inference_mode()
def first_pass(
    coder: Transcoder,
    split: TextSplit,
    n_rows: int,
    select: Select | None,
    baselines: Baselines,
    moments: Moments,
    vocabulary: int,
    tick: Tick,
    peers: Processes = ALONE,
) -> First:
    """One reading of rows [0, n_rows); `moments` are the split's outputs', `tick` gets each block's rows.

    With `peers` each process reads a part of the rows; all have the result.
    """
    n_latents, device = len(coder.W_dec), coder.W_dec.device
    positions = split.contexts.shape[1]
    first = First(
        measurement=Measurement(coder, select),
        baselines=baselines,
        error_map=ErrorMap(
            np.asarray(moments.mean),
            float(moments.variance.sum()),
            typical_rows(split, moments),
            len(coder.prefix_ends),
            vocabulary,
            positions,
            device,
        ),
        coactivation=Coactivation(n_latents, n_rows, before=own_rows(n_rows, peers)[0]),
        top=Best(n_latents, N_TOP, device),
        even=Best(n_latents, N_EVEN),
        sampled=Best(n_latents, N_LABEL, device),
    )
    for start, stop, inputs, outputs in batches(split, blocks(n_rows, peers), device):
        context, position = split.provenance(start, stop)
        token = tokens_at(split.contexts, context, position)
        nested, errors = first.measurement.add(inputs, outputs)
        first.baselines.add(inputs, outputs)
        first.error_map.add(outputs, errors, token, position)
        entries = nested[-1]
        first.coactivation.add(entries)
        numbers = lottery(np.arange(start, stop)), _places(context, position, positions), token
        drawn, place, tokens = on_device(device, *numbers)
        first.top.add(entries, strength(entries.values), place, tokens)
        first.sampled.add(entries, drawn[entries.rows], place, tokens)
        tick(stop - start)
    first.merge(peers)
    first.top.finish()
    first.sampled.finish()
    first.even = first.sampled.first(N_EVEN)
    return first


@torch.inference_mode()
def second_pass(
    coder: Transcoder,
    split: TextSplit,
    n_rows: int,
    first: First,
    measured: Measured,
    tick: Tick,
    peers: Processes = ALONE,
) -> Samples:
    """The samples of every living latent with its activations on the tokens around them; labels are `measured`.

    With `peers` each process reads a part of the rows; all have the result.
    """
    n_contexts, positions = split.contexts.shape
    samples = choose(first.top, first.even, positions)
    device = coder.W_dec.device
    shader = Shader(samples, n_contexts, positions, device)
    for start, stop, inputs, _ in batches(split, blocks(n_rows, peers), device):
        entries = coder.active(inputs)
        context, position = split.provenance(start, stop)
        shader.add(entries, on_device(device, _places(context, position, positions))[0])
        measured.add(context, position, entries)
        tick(stop - start)
    peers.wait()
    for own in (shader, measured):
        own.merge(peers)
    return samples


def _places(context: np.ndarray, position: np.ndarray, positions: int) -> np.ndarray:
    return context.astype(np.int64) * positions + position

"""The streaming pass: every statistic of every prefix from one reading of the rows.

Shapes: B rows of a block, F latents, G prefixes, D_in and D_out widths.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.device import constant
from common.processes import Processes
from evaluate.metrics.firing import Firing
from evaluate.metrics.reconstruction import Reconstruction, Sparsity
from evaluate.metrics.rows import Split, batches, blocks
from evaluate.records import LanguageMetrics, PrefixMetrics, TrainingSelection
from transcoder import Transcoder
from transcoder.entries import Entries, decode, entries_above, joined, reselected
from transcoder.frequent import FREQUENT, frequent_level
from transcoder.fvu import Deviation
from transcoder.selection import SELECT

Select = Callable[[Tensor], Entries]
"""Pre-activations of a batch [B, F] -> its active entries."""


def training_selection(kind: str, k: int) -> Select:
    """The selection that `transcoder.selection` names: k a row on average over the batch, or k in each row."""
    return lambda pre: SELECT[kind](pre, k)[0]


@dataclass
class Prefix:
    """Accumulators of one prefix, gated by its own threshold."""

    end: int
    threshold: float
    """Mean over the latents, where each has its own."""
    error: Reconstruction
    sparsity: Sparsity
    firing: Firing
    training_error: Reconstruction
    """With the selection of training (batch top-k or top-k) instead of the threshold."""
    training_sparsity: Sparsity

    def merge(self, peers: Processes) -> None:
        """Add the rows of all processes."""
        for own in (self.error, self.sparsity, self.firing, self.training_error, self.training_sparsity):
            own.merge(peers)

    def result(self, deviation: float, language: LanguageMetrics | None) -> PrefixMetrics:
        """`deviation`: sum ||y - mean(y)||^2 over the same rows; `language`: None where that was not measured."""
        frequent = int((self.firing.density > FREQUENT).sum())
        return PrefixMetrics(
            end=self.end,
            **dict(self.error.result(deviation)),
            **dict(self.sparsity.result()),
            threshold=self.threshold,
            dead_fraction=self.firing.dead_fraction,
            over_1_percent=int((self.firing.density > 0.01).sum()),
            over_10_percent=frequent,
            over_10_percent_fraction=frequent / self.end,
            over_10_percent_verdict=frequent_level(frequent / self.end),
            training_selection=self._training(deviation),
            cross_entropy=language,
        )

    def _training(self, deviation: float) -> TrainingSelection | None:
        if not self.training_error.rows:
            return None
        sparsity = self.training_sparsity.result()
        return TrainingSelection(
            **dict(self.training_error.result(deviation)), l0=sparsity.l0, l1=sparsity.l1
        )


class Measurement:
    """Everything the pass accumulates, on the coder's device.

    `add` takes blocks, `result` gives a record of each prefix.
    `select` is how training chose the active latents of a batch, None for a coder of which that is unknown.
    """

    def __init__(self, coder: Transcoder, select: Select | None) -> None:
        self.coder, self.select = coder, select
        width, device = coder.W_dec.shape[1], coder.W_dec.device
        self.deviation = Deviation(width, device)
        self.prefixes = [
            Prefix(
                end,
                float(threshold.double().mean()),
                Reconstruction(width, device),
                Sparsity(end, device),
                Firing(end, device),
                Reconstruction(width, device),
                Sparsity(end, device),
            )
            for end, threshold in zip(coder.prefix_ends, coder.thresholds, strict=True)
        ]

    def add(self, inputs: Tensor, outputs: Tensor) -> tuple[list[Entries], Tensor]:
        """A block of rows: `inputs` [B, D_in], `outputs` [B, D_out], on the coder's device.

        Returns each prefix's entries, and the squared error of each row [G, B] float64, on that device too.
        """
        base = self.coder.base_output(inputs)
        self.deviation.add(outputs)
        active, kept = prefix_entries(inputs, self.coder, self.select)
        errors = []
        for prefix, entries in zip(self.prefixes, active, strict=True):
            errors.append(prefix.error.add(outputs, decode(entries, self.coder.W_dec, base)))
            prefix.sparsity.add(entries)
            prefix.firing.add(entries)
        if kept is not None:
            self._add_training(kept, outputs, base)
        return active, torch.stack(errors)

    def _add_training(self, kept: Entries, outputs: Tensor, base: Tensor) -> None:
        ends = constant(self.coder.prefix_ends, torch.int64, kept.latents.device)
        for prefix, entries in zip(self.prefixes, kept.each(kept.latents < ends[:, None]), strict=True):
            prefix.training_error.add(outputs, decode(entries, self.coder.W_dec, base))
            prefix.training_sparsity.add(entries)

    def merge(self, peers: Processes) -> None:
        """Add the rows of all processes."""
        for own in (self.deviation, *self.prefixes):
            own.merge(peers)

    def result(self, language: Sequence[LanguageMetrics] = ()) -> list[PrefixMetrics]:
        """Every prefix's numbers; `language`: what the language model says of each, none where it was not asked."""
        deviation = self.deviation.total
        said = language or [None] * len(self.prefixes)
        return [prefix.result(deviation, each) for prefix, each in zip(self.prefixes, said, strict=True)]


def prefix_entries(
    inputs: Tensor, coder: Transcoder, select: Select | None = None
) -> tuple[list[Entries], Entries | None]:
    """For each prefix g the entries of its latents [0, P_g) above its own threshold theta_g; those that `select` takes.

    The pre-activations of `inputs` [B, D_in] are made once, a slice of the latents at a time, and searched once, with
    the lowest threshold of each latent. A top-k transcoder's prefixes each have their own k largest.
    """
    lowest, n_prefixes = coder.thresholds.amin(0), len(coder.prefix_ends)
    found: list[list[tuple[int, Entries]]] = [[] for _ in range(n_prefixes if coder.k else 1)]
    selected: list[tuple[int, Entries]] = []
    for own, pre in coder.slices(inputs):
        if coder.k is None:
            found[0].append((own.start, entries_above(pre, lowest[own] if lowest.ndim else lowest)))
        else:
            for g, parts in enumerate(found):
                parts.append(coder.part(pre, own, g))
        if select is not None:
            selected.append((own.start, select(pre)))
    kept = joined(selected) if selected else None
    if kept is not None and select is not None and len(selected) > 1:
        kept = reselected(kept, select)
    if coder.k is None:
        return _by_prefix(joined(found[0]), coder), kept
    return [coder.whole(parts) for parts in found], kept


def _by_prefix(loose: Entries, coder: Transcoder) -> list[Entries]:
    thresholds, ends = coder.thresholds, constant(coder.prefix_ends, torch.int64, loose.rows.device)
    own = thresholds[:, None] if thresholds.ndim == 1 else thresholds[:, loose.latents]
    return loose.each((loose.latents < ends[:, None]) & (loose.values > own))


@torch.inference_mode()
def measure(
    coder: Transcoder, split: Split, n_rows: int, select: Select | None, tick: Callable[[int], object]
) -> Measurement:
    """Pass over the first `n_rows` rows of `split`; `tick` is called with the rows of each block."""
    measurement = Measurement(coder, select)
    for start, stop, inputs, outputs in batches(split, blocks(n_rows), coder.W_dec.device):
        measurement.add(inputs, outputs)
        tick(stop - start)
    return measurement

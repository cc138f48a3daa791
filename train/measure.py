"""Thresholds from train rows, and what a transcoder does on held-out rows.

Shapes: n rows, F latents, G prefixes.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from transcoder.entries import decode, entries_above
from transcoder.frequent import FREQUENT
from transcoder.fvu import Deviation, ratio
from transcoder.heavy import Typical
from transcoder.selection import kth_largest, select_batch
from transcoder.transcoder import Transcoder

CALIBRATION_ROWS = 65_536
MEASURED_ROWS = 65_536
"""Held-out rows looked at after training; evaluate/ looks at all."""
PROBE_ROWS = 2_048
"""Held-out rows looked at during training."""

Pairs = Iterable[tuple[Tensor, Tensor]]


class Measured(NamedTuple):
    """Of every prefix, coarsest first."""

    fvu: list[float | None]
    """None when the rows do not vary."""
    l0: list[float]
    dead: int
    """Latents of the full transcoder that fired on none of the rows."""
    rows: int
    dead_fraction: list[float]
    """Share of the prefix's latents that fired on none of the rows."""
    over_10_percent_fraction: list[float]
    """Share of the prefix's latents that fired on more than `FREQUENT` of the rows."""
    heavy_rows: int
    """Number of rows whose outputs lie far from all others (`transcoder.heavy`)."""
    fvu_typical: list[float | None]
    """FVU without them."""


def measure(
    transcoder: Transcoder, pairs: Pairs, thresholds: Callable[[Tensor], Tensor], typical: Typical
) -> Measured:
    """FVU and L0 of each prefix over (inputs, outputs) pairs.

    `thresholds` gives [G] cuts for a batch of pre-activations [n, F]. `typical`: tells heavy rows.
    """
    groups = len(transcoder.prefix_ends)
    active = torch.zeros(groups, dtype=torch.float64)
    errors, of_typical = torch.zeros(2, groups, dtype=torch.float64)
    deviation, typical_deviation = Deviation(transcoder.d_out), Deviation(transcoder.d_out)
    firings = torch.zeros(groups, transcoder.d_sae, dtype=torch.int64)
    for inputs, outputs in pairs:
        pre, base = transcoder.pre_activations(inputs), transcoder.base_output(inputs)
        kept = typical.distances(outputs) <= typical.limit
        for g, cut in enumerate(thresholds(pre).tolist()):
            entries = entries_above(pre[:, : transcoder.prefix_ends[g]], cut)
            y_g = decode(entries, transcoder.W_dec, base)
            of_rows = (y_g - outputs).double().square().sum(1)
            errors[g] += of_rows.sum().cpu()
            of_typical[g] += of_rows[kept].sum().cpu()
            active[g] += len(entries.values)
            firings[g] += torch.bincount(entries.latents, minlength=transcoder.d_sae).cpu()
        deviation.add(outputs)
        if bool(kept.any()):
            typical_deviation.add(outputs[kept])
    n = deviation.rows
    own = [firings[g, :end] for g, end in enumerate(transcoder.prefix_ends)]
    return Measured(
        [ratio(error, deviation.total) for error in errors.tolist()],
        (active / max(n, 1)).tolist(),
        dead=int((own[-1] == 0).sum()),
        rows=n,
        dead_fraction=[float((each == 0).double().mean()) for each in own],
        over_10_percent_fraction=[float((each > FREQUENT * n).double().mean()) for each in own],
        heavy_rows=n - typical_deviation.rows,
        fvu_typical=[ratio(error, typical_deviation.total) for error in of_typical.tolist()],
    )


def training_cut(k: int, groups: int) -> Callable[[Tensor], Tensor]:
    """Cuts at which k latents per row are active on average over the batch, for all prefixes the same."""

    def cuts(pre: Tensor) -> Tensor:
        _, cut = select_batch(pre, k)
        return torch.nextafter(cut, torch.zeros_like(cut)).repeat(groups)  # kept are those above

    return cuts


def calibrate(
    transcoder: Transcoder, inputs: Callable[[], Iterator[Tensor]], kept_per_row: list[float]
) -> Tensor:
    """Thresholds [G] at which each prefix has as many active latents per row as it had in training.

    theta_g is the midpoint of the (n * K_g)-th and the next largest positive activation of prefix g
    over the n rows of `inputs`; 0 when there are fewer. `inputs` is called again when a first guess
    of what can be ignored was too high.
    """
    first = transcoder.pre_activations(next(inputs()))
    guess_rank = min(first.numel(), max(1, int(2 * max(kept_per_row) * len(first))))
    guess = max(0.0, kth_largest(first.view(-1), guess_rank).item())
    thresholds: list[float] = []
    for floor in (guess, guess / 4, 0.0):
        candidates = [
            _threshold(*values, floor) for values in _largest(transcoder, inputs(), kept_per_row, floor)
        ]
        thresholds = [theta for theta in candidates if theta is not None]
        if len(thresholds) == len(kept_per_row):
            break
    return torch.tensor(thresholds, dtype=torch.float32)


def _largest(
    transcoder: Transcoder, inputs: Iterator[Tensor], kept_per_row: list[float], floor: float
) -> list[tuple[Tensor, int]]:
    """For each prefix its activations above `floor`, and how many of them belong above its threshold."""
    starts = (0, *transcoder.prefix_ends[:-1])
    groups: list[list[Tensor]] = [[] for _ in starts]
    n = 0
    for rows in inputs:
        pre = transcoder.pre_activations(rows)
        n += len(rows)
        for parts, start, end in zip(groups, starts, transcoder.prefix_ends, strict=True):
            part = pre[:, start:end]
            parts.append(part[part > floor])
    values = [torch.cat(parts) for parts in groups]
    return [(torch.cat(values[: g + 1]), round(n * kept)) for g, kept in enumerate(kept_per_row)]


def _threshold(values: Tensor, wanted: int, floor: float) -> float | None:
    """Midpoint of the wanted-th and the next largest value; none when `floor` hid one of them."""
    if wanted + 1 > len(values):
        return 0.0 if floor == 0.0 else None
    below = kth_largest(values, wanted + 1)
    above = kth_largest(values, wanted) if wanted else below
    return ((above.double() + below.double()) / 2).item()

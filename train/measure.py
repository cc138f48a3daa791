"""Thresholds from train rows, and what a transcoder does on held-out rows.

Shapes: n rows, F latents, G prefixes.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from common.mesh import Mesh
from common.processes import ALONE, Processes
from transcoder.entries import decode, entries_above
from transcoder.frequent import FREQUENT
from transcoder.fvu import Deviation, ratio
from transcoder.heavy import Typical
from transcoder.selection import kth_largest, select_batch
from transcoder.transcoder import Transcoder

CALIBRATION_ROWS = 65_536
MEASURED_ROWS = 65_536
"""Held-out rows that are measured after training; evaluate/ measures all."""
PROBE_ROWS = 2_048
"""Held-out rows that are measured during training."""

Pairs = Iterable[tuple[Tensor, Tensor]]


class Measured(NamedTuple):
    """Lists have a value for every prefix, coarsest first."""

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
    transcoder: Transcoder,
    pairs: Pairs,
    thresholds: Callable[[Tensor], Tensor],
    typical: Typical,
    holders: Processes = ALONE,
) -> Measured:
    """FVU and L0 of each prefix over (inputs, outputs) pairs.

    `thresholds` gives [G] cuts for a batch of pre-activations [n, F]. `typical`: tells heavy rows. If several
    `holders` share the latents, `transcoder` has those of this process, all holders see the same pairs, and the numbers
    are those of the whole transcoder.
    """
    groups = len(transcoder.prefix_ends)
    active = torch.zeros(groups, dtype=torch.float64)
    errors, of_typical = torch.zeros(2, groups, dtype=torch.float64)
    deviation, typical_deviation = Deviation(transcoder.d_out), Deviation(transcoder.d_out)
    firings = torch.zeros(groups, transcoder.d_sae, dtype=torch.int64)
    for inputs, outputs in pairs:
        pre, base = transcoder.pre_activations(inputs), transcoder.base_output(inputs)
        if not holders.leads:
            base = torch.zeros_like(base)  # in the sum over the holders it counts once
        kept = typical.distances(outputs) <= typical.limit
        for g, cut in enumerate(thresholds(pre).tolist()):
            entries = entries_above(pre[:, : transcoder.prefix_ends[g]], cut)
            y_g = holders.total(decode(entries, transcoder.W_dec, base))
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
    counts = [[len(each), int((each == 0).sum()), int((each > FREQUENT * n).sum())] for each in own]
    latents, dead, frequent = _total(torch.tensor(counts), holders).T.double()
    return Measured(
        [ratio(error, deviation.total) for error in errors.tolist()],
        (_total(active, holders) / max(n, 1)).tolist(),
        dead=int(dead[-1]),
        rows=n,
        dead_fraction=(dead / latents).tolist(),
        over_10_percent_fraction=(frequent / latents).tolist(),
        heavy_rows=n - typical_deviation.rows,
        fvu_typical=[ratio(error, typical_deviation.total) for error in of_typical.tolist()],
    )


def _total(counts: Tensor, holders: Processes) -> Tensor:
    """The sum over the holders of counts on the CPU."""
    return holders.total(counts.to(holders.device)).cpu()


def training_cut(k: int, groups: int, holders: Processes = ALONE) -> Callable[[Tensor], Tensor]:
    """Cuts at which k latents per row are active on average over the batch, the same cut for all prefixes.

    Counted over the latents of all `holders`, which see the same rows.
    """
    mesh = Mesh(everyone=holders, latents=holders)

    def cuts(pre: Tensor) -> Tensor:
        _, cut = select_batch(pre, k, mesh=mesh)
        return torch.nextafter(cut, torch.zeros_like(cut)).repeat(groups)  # kept are those above

    return cuts


def calibrate(
    transcoder: Transcoder,
    inputs: Callable[[], Iterator[Tensor]],
    kept_per_row: list[float],
    holders: Processes = ALONE,
) -> Tensor:
    """Thresholds [G] at which each prefix has as many active latents per row as it had in training.

    theta_g is the midpoint of the (n * K_g)-th and the next largest positive activation of prefix g
    over the n rows of `inputs`; 0 when there are fewer. `inputs` is called again when a first guess
    of what can be ignored was too high. If several `holders` share the latents, `transcoder` has those of this process.
    """
    first = transcoder.pre_activations(next(inputs()))
    guess_rank = max(1, int(2 * max(kept_per_row) * len(first)))
    values = first.view(-1)
    if holders.world > 1:
        values = holders.gathered(values.topk(min(guess_rank, len(values)), sorted=False).values)
    guess = max(0.0, kth_largest(values, min(guess_rank, len(values))).item())
    thresholds: list[float] = []
    for floor in (guess, guess / 4, 0.0):
        candidates = [
            _threshold(*values, floor)
            for values in _largest(transcoder, inputs(), kept_per_row, floor, holders)
        ]
        thresholds = [theta for theta in candidates if theta is not None]
        if len(thresholds) == len(kept_per_row):
            break
    return torch.tensor(thresholds, dtype=torch.float32)


def _largest(
    transcoder: Transcoder,
    inputs: Iterator[Tensor],
    kept_per_row: list[float],
    floor: float,
    holders: Processes,
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
    values = [holders.gathered(torch.cat(parts)) for parts in groups]
    return [(torch.cat(values[: g + 1]), round(n * kept)) for g, kept in enumerate(kept_per_row)]


def _threshold(values: Tensor, wanted: int, floor: float) -> float | None:
    """Midpoint of the wanted-th and the next largest value; None when `floor` hid one of them."""
    if wanted + 1 > len(values):
        return 0.0 if floor == 0.0 else None
    below = kth_largest(values, wanted + 1)
    above = kth_largest(values, wanted) if wanted else below
    return ((above.double() + below.double()) / 2).item()

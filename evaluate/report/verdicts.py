"""Verdicts: a number and whether it is good. The limits are conventions, not laws; docs/numbers.md says whose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from common.numbers import with_error
from transcoder.frequent import FREQUENT, FREQUENT_GOOD, FREQUENT_MODERATE

if TYPE_CHECKING:  # --help does not wait for the records
    from evaluate.records import ErrorMetrics, Results

FVU_GOOD, FVU_MODERATE = 0.1, 0.3
DEAD_GOOD = 0.10
REDUNDANCY_GOOD = 0.01


@dataclass(frozen=True)
class Verdict:
    """One number and how it stands."""

    name: str
    value: str
    level: Literal["good", "moderate", "poor", "unknown", "info"]
    limit: str
    """The threshold in words; what the number is, where there is none."""


def verdicts(results: Results, g: int = -1) -> list[Verdict]:
    """The verdicts on prefix `g`; by default on the full dictionary."""
    prefix, redundancy = results.prefixes[g], results.redundancy.prefixes[g]
    verdicts = [
        _fvu(prefix.fvu),
        *_typical(results.errors, g),
        _dead(prefix.dead_fraction, results.rows),
        _redundancy(redundancy.share, results.redundancy.limit),
        _frequent(prefix.over_10_percent_fraction, prefix.over_10_percent_verdict),
    ]
    sparsity = f"active latents per row, median {prefix.l0_median:g}"
    verdicts.append(Verdict("L0", f"{prefix.l0:.1f}", "info", sparsity))
    if prefix.cross_entropy:
        recovered = prefix.cross_entropy.recovered_zero
        value = "undefined" if recovered is None else f"{100 * recovered:.1f} %"
        limit = (
            "zeroing the MLP's output costs nothing"
            if recovered is None
            else "against zeroing the MLP's output"
        )
        if (increase := prefix.cross_entropy.increase) is not None:
            limit += f"; {with_error(increase, prefix.cross_entropy.increase_error)} nats per token"
        verdicts.append(Verdict("Cross-entropy recovered", value, "info", limit))
    return verdicts


def _dead(fraction: float, rows: int) -> Verdict:
    level = "good" if fraction < DEAD_GOOD else "poor"
    limit = f"below {100 * DEAD_GOOD:g} % (never fired on {rows:,} rows)"
    return Verdict("Dead latents", f"{100 * fraction:.1f} %", level, limit)


def _frequent(fraction: float, level: Literal["good", "moderate", "poor"]) -> Verdict:
    limit = (
        f"at most {100 * FREQUENT_GOOD:g} % good, at most {100 * FREQUENT_MODERATE:g} % moderate "
        f"(share of the latents that fire on more than {100 * FREQUENT:g} % of the rows)"
    )
    return Verdict("Frequent latents", f"{100 * fraction:.1f} %", level, limit)


def _redundancy(share: float | None, cosine: float) -> Verdict:
    limit = f"below {REDUNDANCY_GOOD:g} (share of latent pairs with |cosine| above {cosine:g})"
    if share is None:
        return Verdict("Redundancy", "undefined: one latent", "unknown", limit)
    return Verdict("Redundancy", f"{share:.2g}", "good" if share < REDUNDANCY_GOOD else "poor", limit)


def _typical(errors: ErrorMetrics, g: int) -> list[Verdict]:
    """The FVU without heavy rows, if there are any: a few of them can decide the FVU of all rows."""
    if errors.heavy is None or errors.heavy_variance is None:
        return []
    rows = errors.heavy.rows
    what = (
        f"{rows:,} heavy row{'s' * (rows > 1)}, {100 * errors.heavy_variance:.1f} % of the outputs' variance"
    )
    without = _fvu(errors.typical.fvu[g])
    return [Verdict("FVU without heavy rows", without.value, without.level, what)]


def _fvu(fvu: float | None) -> Verdict:
    limit = f"below {FVU_GOOD:g} good, below {FVU_MODERATE:g} moderate"
    if fvu is None:
        return Verdict("FVU", "undefined: the outputs are constant", "unknown", limit)
    level = "good" if fvu < FVU_GOOD else "moderate" if fvu < FVU_MODERATE else "poor"
    return Verdict("FVU", f"{fvu:.3f}", level, limit)

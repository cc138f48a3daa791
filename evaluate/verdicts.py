"""The guide's thresholds as verdicts."""

from dataclasses import dataclass
from typing import Any, Literal

FVU_GOOD, FVU_MODERATE = 0.1, 0.3
DEAD_GOOD = 0.10
REDUNDANCY_GOOD = 0.01


@dataclass(frozen=True)
class Verdict:
    name: str
    value: str
    level: Literal["good", "moderate", "poor", "unknown"]
    limit: str
    """The guide's threshold in words."""


def verdicts(metrics: dict[str, Any]) -> list[Verdict]:
    """One verdict per threshold of the guide, for the full dictionary."""
    full = metrics["prefixes"][-1]
    rows = metrics["rows"]
    made = [
        _fvu(full["fvu"]),
        Verdict(
            "Dead latents",
            f"{100 * full['dead_fraction']:.1f} %",
            "good" if full["dead_fraction"] < DEAD_GOOD else "poor",
            f"below {100 * DEAD_GOOD:g} % (never fired on {rows:,} rows)",
        ),
    ]
    share = metrics["redundancy"].get("share")
    if share is not None:
        level = "good" if share < REDUNDANCY_GOOD else "poor"
        limit = f"below {REDUNDANCY_GOOD:g} (share of latent pairs with |cosine| > 0.9)"
        made.append(Verdict("Redundancy", f"{share:.2g}", level, limit))
    return made


def _fvu(fvu: float | None) -> Verdict:
    limit = f"below {FVU_GOOD:g} good, below {FVU_MODERATE:g} moderate"
    if fvu is None:
        return Verdict("FVU", "undefined: the outputs are constant", "unknown", limit)
    level = "good" if fvu < FVU_GOOD else "moderate" if fvu < FVU_MODERATE else "poor"
    return Verdict("FVU", f"{fvu:.3f}", level, limit)

"""The numbers of the report's tables as columns of text, their decimals under each other.

Each list of cells has an entry a row.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from common.numbers import aligned as aligned_errors
from evaluate.records import Results
from evaluate.report.console import increase


@dataclass(frozen=True)
class Column:
    """One column of a table."""

    name: str
    cells: list[str]
    title: str = ""
    """What a word in the name stands for."""
    bars: list[float] = field(default_factory=list)
    """Length of the bar behind each cell, 0 to 1; none: no bars."""
    group: int | None = None
    """Whose colour the bars have."""


def aligned(values: Iterable[float | None], dash: str = "–") -> list[str]:
    """Numbers for one column, all with the same number of decimals.

    Three digits of the largest; a decimal more if the smallest then has three, up to three more if it then has two:

    >>> aligned([0.5642, None, 0.324]), aligned([0.417, 1.0])
    (['0.564', '–', '0.324'], ['0.417', '1.000'])
    >>> aligned([15, 32.42]), aligned([1200.0, 3]), aligned([12, 3456]), aligned([0.0, 0.0])
    (['15.0', '32.4'], ['1,200.0', '3.0'], ['12', '3,456'], ['0', '0'])
    >>> aligned([1.5, 0.00023, 1e-9])
    ['1.50000', '0.00023', '0.00000']
    """
    given = list(values)
    sizes = [abs(value) for value in given if value]
    decimals = 0
    if sizes and any(isinstance(value, float) for value in given):
        large, small = (math.floor(math.log10(size)) for size in (max(sizes), min(sizes)))
        decimals = max(0, 2 - large, min(2 - small, 3 - large), min(1 - small, 5 - large))
    return [dash if value is None else f"{value:,.{decimals}f}" for value in given]


def aligned_percent(shares: Iterable[float | None]) -> list[str]:
    """Shares as percentages for one column."""
    return aligned(None if share is None else 100.0 * share for share in shares)


def prefix_columns(results: Results, baselines: Sequence[Any]) -> list[Column]:
    """Of every prefix, then of every baseline, which lacks some of the numbers; without the latents' column."""
    prefixes = results.prefixes

    def of(
        name: str, value: Callable[[Any], Any], title: str = "", write: Callable[..., list[str]] = aligned
    ) -> Column:
        cells = write([value(prefix) for prefix in prefixes])
        return Column(name, cells + [""] * len(baselines), title)

    def of_all(name: str, key: str, title: str = "") -> Column:
        cells = aligned(getattr(each, key, None) for each in (*prefixes, *baselines))
        lacking = [key not in type(each).model_fields for each in (*prefixes, *baselines)]
        return Column(name, ["" if none else cell for none, cell in zip(lacking, cells, strict=True)], title)

    return [
        of_all("FVU", "fvu", "fraction of variance unexplained"),
        of("FVU, training selection", lambda p: p.training_selection and p.training_selection.fvu),
        of_all("MSE", "mse"),
        of_all("MAE", "mae"),
        of_all("cosine", "cosine"),
        of_all("bias", "relative_bias", "E|y_hat|² / E<y, y_hat>"),
        of_all("L0", "l0"),
        of("L0 median", lambda p: p.l0_median, "of L0 over the rows"),
        of("L0 std", lambda p: p.l0_std, "of L0 over the rows"),
        of("L1", lambda p: p.l1, "summed activations of a row, mean over the rows"),
        of("threshold", lambda p: p.threshold),
        of("dead %", lambda p: p.dead_fraction, write=aligned_percent),
        of("latents over 1 %", lambda p: p.over_1_percent, "latents that fire on more than 1 % of the rows"),
        of("over 10 %", lambda p: p.over_10_percent, "latents that fire on more than 10 % of the rows"),
        of("share %", lambda p: p.over_10_percent_fraction, "their share of the latents", aligned_percent),
        of(
            "CE increase",
            lambda p: p.cross_entropy,
            "of the cross-entropy, nats per token ± standard error over contexts",
            lambda measured: aligned_errors([increase(each, "–") for each in measured]),
        ),
        of(
            "CE recovered %",
            lambda p: p.cross_entropy and p.cross_entropy.recovered_zero,
            write=aligned_percent,
        ),
        of(
            "KL (nats)",
            lambda p: p.cross_entropy and p.cross_entropy.kl,
            "KL divergence of the next-token distribution, nats per token",
        ),
    ]


def group_columns(results: Results) -> list[Column]:
    """Of every nesting level."""
    groups = results.latents.groups

    def of(name: str, key: str, write: Callable[..., list[str]] = aligned, title: str = "") -> Column:
        return Column(name, write([getattr(group, key) for group in groups]), title)

    columns = [
        Column("latents", [f"{group.start:,}–{group.end - 1:,}" for group in groups]),
        of("alive", "alive"),
        of("dead %", "dead_fraction", aligned_percent),
        of("active per row", "l0"),
        of("energy %", "energy_share", aligned_percent),
        of("median density %", "median_density", aligned_percent),
        of("median token entropy (bits)", "median_entropy_bits"),
        of(
            "median activation on top token %",
            "median_top_token_share",
            aligned_percent,
            "share of a latent's activation that is on its top token",
        ),
        of("median nearest cosine", "median_nearest_cosine"),
    ]
    if len(groups) > 1:
        columns.append(of("with a parent %", "with_parent_fraction", aligned_percent))
    return columns


def error_columns(results: Results) -> list[Column]:
    """Of every token of the error map."""
    lines, last = results.errors.by_token, len(results.prefixes) - 1
    shares = [line.error_share or 0.0 for line in lines]
    columns = [
        Column("rows", aligned(line.rows for line in lines)),
        Column("share of rows %", aligned_percent(line.rows / results.rows for line in lines)),
        Column(
            "share of error %",
            aligned_percent(line.error_share for line in lines),
            bars=[share / (max(shares) or 1) for share in shares],
        ),
    ]
    for g in range(last + 1):
        fvu = [line.fvu[g] for line in lines]
        bars = [min(value or 0.0, 1.0) for value in fvu]
        columns.append(Column(f"FVU, prefix {g}" if last else "FVU", aligned(fvu), "", bars, g))
    return columns

"""compare.html: every prefix of several transcoders, grouped by their number of latents."""

from collections.abc import Sequence
from itertools import groupby
from math import floor, isfinite, log10
from pathlib import Path
from urllib.parse import quote

from pydantic import JsonValue

from common.files import write_whole
from common.numbers import MARK, number_or_dash
from evaluate.comparison.records import ComparedPrefix, ComparedTranscoder, Comparison
from evaluate.metrics.side_by_side import COLUMNS, LANGUAGE, Column
from evaluate.report import plots, plotted
from evaluate.report.figures import Plot, draw_each
from evaluate.report.report import elements
from evaluate.report.templates import html


def write_page(folder: Path, values: Comparison) -> None:
    """compare.html and compare.png in `folder`, of what was measured."""
    series: dict[str, list[tuple[float, float | None]]] = {}
    for line in values.lines:
        fvu = line.fvu if line.fvu_typical is None else line.fvu_typical
        series.setdefault(line.transcoder, []).append((line.l0, fvu))
    linear = None if values.heavy_rows else values.linear_map_fvu  # on all rows, so not on this plot
    plot = Plot(
        "compare",
        "overview",
        "Error against sparsity" + ", without heavy rows" * bool(values.heavy_rows),
        lambda: plots.fvu_against_l0(series, linear),
        lambda: plotted.fvu_against_l0(series, linear),
    )
    page = html(
        "compare.html",
        "compare.js",
        values=values,
        run=values.lines[0].transcoder,
        mark=MARK if values.heavy_rows else "",
        groups=by_latents(values.lines),
        columns=shown(values.lines),
        number_of=number_of,
        cell=cell,
        level=level,
        reports={each.transcoder: each.report and quote(each.report) for each in values.transcoders},
        others=[each.transcoder for each in values.transcoders[1:]],
        ranges={name: l0_range(points) for name, points in series.items()},
        settings={
            key: {name: short(each) for name, each in row.items()}
            for key, row in values.differing_settings.items()
        },
        unknown=[each.transcoder for each in values.transcoders if not each.known_settings],
        language_note=language_note(values.transcoders),
        plots=elements(draw_each([plot], folder)),
    )
    write_whole(folder / "compare.html", page.encode())


def by_latents(lines: Sequence[ComparedPrefix]) -> list[tuple[int, list[ComparedPrefix]]]:
    """The prefixes with equally many latents, fewest first; of one number in the order of `lines`."""
    ordered = sorted(lines, key=lambda line: line.end)
    return [(end, [*group]) for end, group in groupby(ordered, key=lambda line: line.end)]


def shown(lines: Sequence[ComparedPrefix]) -> dict[str, Column]:
    """The columns that the table has: those of the cross-entropy, and of heavy rows, where any line has one."""
    lacking = set() if any(line.cross_entropy for line in lines) else {*LANGUAGE}
    if all(line.fvu_typical is None for line in lines):
        lacking.add("fvu_typical")
    return {
        key: aligned(column, [number_of(line, key) for line in lines])
        for key, column in COLUMNS.items()
        if key not in lacking
    }


def aligned(column: Column, values: Sequence[float | None]) -> Column:
    """A column of three significant digits, with the decimals that its largest number has in every row."""
    largest = max((abs(column.scale * value) for value in values if value), default=1.0)
    if not column.spec.endswith("g") or not isfinite(largest):
        return column
    return column._replace(spec=f".{max(0, 2 - floor(log10(largest)))}f")


def l0_range(points: Sequence[tuple[float, float | None]]) -> str:
    """In words, from where to where a transcoder's L0 goes."""
    low, high = min(x for x, _ in points), max(x for x, _ in points)
    return f"{low:.1f}" if low == high else f"{low:.1f} to {high:.1f}"


def short(value: JsonValue) -> str:
    """A setting's value in words."""
    if isinstance(value, list):
        return ", ".join(map(short, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key} {short(each)}" for key, each in value.items()) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def language_note(transcoders: Sequence[ComparedTranscoder]) -> str:
    """On how many tokens the cross-entropies were measured, or that they were not."""
    tokens = {each.transcoder: each.cross_entropy.positions for each in transcoders if each.cross_entropy}
    if not tokens:
        return (
            "No cross-entropy: none of these transcoders is evaluated with it on these rows (make evaluate)."
        )
    without = [each.transcoder for each in transcoders if each.transcoder not in tokens]
    lacking = f" Without a cross-entropy on these rows: {', '.join(without)} (make evaluate)." * bool(without)
    if len({*tokens.values()}) == 1:
        n = next(iter(tokens.values()))
        return f"Cross-entropy and KL are from the transcoders' own evaluations, on the same {n:,} tokens.{lacking}"
    counts = ", ".join(f"{name} {n:,}" for name, n in tokens.items())
    return (
        f"Cross-entropy and KL are from the transcoders' own evaluations, on different numbers of tokens: {counts}; "
        f"no difference is given between those.{lacking}"
    )


def number_of(line: ComparedPrefix, key: str) -> float | None:
    """What a column of `COLUMNS` shows of a prefix, before its scale."""
    return getattr(line.cross_entropy, key, None) if key in LANGUAGE else getattr(line, key)


def cell(column: Column, value: float | None, sign: str = "") -> str:
    """A number as its column writes it."""
    return number_or_dash(None if value is None else column.scale * value, f"{sign}{column.spec}", "–")


def level(column: Column, difference: float | None) -> str:
    """Whether a difference is for the better or the worse, as a class of the page; neither where it does not show."""
    if not difference or not column.better or not float(cell(column, difference)):
        return ""
    return "good" if difference * column.better > 0 else "poor"

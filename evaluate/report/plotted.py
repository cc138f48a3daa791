"""The numbers behind each plot, as columns: what the page shows in a table below it, and gives as CSV.

A function for each of plots.py, of the same arguments.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from urllib.parse import quote

import numpy as np
from markupsafe import Markup

from evaluate.report.plots import (
    QUANTILES,
    SPECIFICITY,
    Line,
    density_bins,
    group_shares,
    size_centres,
)

Columns = Mapping[str, Sequence[str | float | None]]
"""Heading -> values, all of one length."""


def fvu_by_prefix(prefixes: Sequence[Line], linear: float | None) -> Columns:
    g = range(len(prefixes))
    return {
        "": [*(f"prefix {each}" for each in g), "best linear map"],
        "latents": [*(prefix["end"] for prefix in prefixes), None],
        "L0": [*(prefix["l0"] for prefix in prefixes), None],
        "FVU": [*(prefix["fvu"] for prefix in prefixes), linear],
    }


def fvu_against_l0(
    series: Mapping[str, Sequence[tuple[float, float | None]]], linear: float | None
) -> Columns:
    points = [(name, g, *point) for name, some in series.items() for g, point in enumerate(some)]
    names, numbers, l0, fvu = zip(*points, strict=True)
    return {
        "": [*names, "best linear map (dense)"],
        "prefix": [*numbers, None],
        "L0": [*l0, None],
        "FVU": [*fvu, linear],
    }


def loss_curve(log: Sequence[Line]) -> Columns:
    names = sorted({key for line in log for key in line if key.startswith("heldout_fvu/prefix_")})
    heldout = {f"held-out FVU, prefix {name.rsplit('_', 1)[1]}": name for name in names}
    keys = {"training rows": "rows", "training loss": "loss", **heldout}
    shown = [line for line in log if any(line.get(key) is not None for key in ("loss", *names))]
    return {heading: [line.get(key) for line in shown] for heading, key in keys.items()}


def cross_entropy(prefixes: Sequence[Line]) -> Columns:
    measured = [prefix["cross_entropy"] for prefix in prefixes]
    return {
        "prefix": [*range(len(prefixes))],
        "latents": [prefix["end"] for prefix in prefixes],
        "recovered, zero ablation (%)": _percent([each["recovered_zero"] for each in measured]),
        "recovered, mean ablation (%)": _percent([each["recovered_mean"] for each in measured]),
    }


def l0_histogram(prefixes: Sequence[Line]) -> Columns:
    counts = [prefix["l0_histogram"] for prefix in prefixes]
    longest = max(map(len, counts))
    rows = {f"rows, prefix {g}": [*own, *[0] * (longest - len(own))] for g, own in enumerate(counts)}
    return {"active latents": [*range(longest)], **rows}


def density_histogram(latents: Line, groups: Sequence[np.ndarray]) -> Columns:
    edges, logs = density_bins(latents, groups)
    counts = {f"latents, group {g}": np.histogram(own, edges)[0].tolist() for g, own in enumerate(logs)}
    return {"log10 of share of rows, from": edges[:-1].tolist(), "to": edges[1:].tolist(), **counts}


def cosine_histogram(redundancy: Line) -> Columns:
    edges = redundancy["nearest_cosine_edges"]
    return {"cosine, from": edges[:-1], "to": edges[1:], "latents": redundancy["nearest_cosine_histogram"]}


def specificity(groups: Sequence[Mapping[str, np.ndarray]]) -> Columns:
    lines = [
        (
            label,
            g,
            *(np.percentile(group[key], QUANTILES) * scale if len(group[key]) else [None] * len(QUANTILES)),
        )
        for key, (label, scale) in SPECIFICITY.items()
        for g, group in enumerate(groups)
    ]
    names = ("", "group", *(f"{quantile} %" for quantile in QUANTILES))
    return dict(zip(names, map(list, zip(*lines, strict=True)), strict=True))


def group_contributions(groups: Sequence[Line], prefixes: Sequence[Line]) -> Columns:
    shares = group_shares(groups, prefixes)
    return {
        "group": [*range(len(groups))],
        **{f"{name.replace(chr(10), ' ')} (%)": _percent(values) for name, values in shares.items()},
    }


def error_by_position(errors: Line) -> Columns:
    lines, edges = errors["by_position"], errors["position_edges"]
    return {
        "position, from": [edges[line["class"]] for line in lines],
        "to": [edges[line["class"] + 1] - 1 for line in lines],
        **_fvu(lines),
    }


def error_by_size(errors: Line) -> Columns:
    lines = errors["by_size"]
    rows = sum(line["rows"] for line in lines)
    return {
        "distance from the mean": size_centres(errors),
        "rows (%)": _percent([line["rows"] / rows for line in lines]),
        "squared error (%)": _percent([line["error_share"] for line in lines]),
        **_fvu(lines),
    }


def error_by_dimension(errors: Line) -> Columns:
    lines = errors["by_dimension"]
    return {
        "output dimension": [line["class"] for line in lines],
        "squared error (%)": _percent([line["error_share"] for line in lines]),
        **_fvu(lines),
    }


def by_layer(layers: Sequence[int], prefixes: Sequence[Sequence[float | None]], label: str) -> Columns:
    return {"layer": [*layers], **{f"{label}, prefix {g}": values for g, values in enumerate(prefixes)}}


def cumulative(
    layers: Sequence[int], increases: Sequence[Sequence[float]], agreements: Sequence[Sequence[float]]
) -> Columns:
    shares = [_percent(own) for own in agreements]
    return {
        **by_layer(layers, increases, "increase (nats)"),
        **by_layer(layers, shares, "top-1 agreement (%)"),
    }


def _percent(shares: Sequence[float | None]) -> list[float | None]:
    return [None if share is None else 100 * share for share in shares]


def _fvu(lines: Sequence[Line]) -> Columns:
    n = len(lines[0]["fvu"]) if lines else 0
    return {f"FVU, prefix {g}": [line["fvu"][g] for line in lines] for g in range(n)}


def table(name: str, columns: Columns) -> Markup:
    """The columns as a table that unfolds, and as a CSV to save; an address of data works offline, without a script."""
    rows = [*zip(*columns.values(), strict=True)]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns.keys(), *rows])
    head = Markup("").join(map(Markup("<th>{}</th>").format, columns))
    body = Markup("").join(
        Markup("<tr>{}</tr>").format(Markup("").join(map(Markup("<td>{}</td>").format, map(_shown, row))))
        for row in rows
    )
    return Markup(
        '<details class="plotted"><summary>Numbers</summary>'
        '<a download="{}.csv" href="data:text/csv;charset=utf-8,{}">CSV</a>'
        '<div class="scroll"><table class="numbers"><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div></details>'
    ).format(name, quote(text.getvalue()), head, body)


def _shown(value: str | float | None) -> str:
    """A number with four digits, those of whole numbers all; the CSV has every digit."""
    if value is None:
        return "–"
    return (
        f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
    )

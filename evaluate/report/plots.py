"""The plots: colour-blind-safe, labelled with units, readable in grey, on paper and on a dark page.

Okabe and Ito's palette, and a marker or line style besides the colour wherever several series meet.
Every function draws one figure from plain values; evaluate/report/figures.py decides which and saves them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

COLOURS = ("#0072b2", "#009e73", "#e69f00", "#cc79a7", "#d55e00", "#56b4e9")
STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))
MARKERS = "osD^vP"
INK, GRID, ON_BAR = "#1c1b1a", "#dfdbd5", "#1c1b1b"
"""The only colours beside the palette: axes and text, grid, text on coloured bars. The page replaces all
of them by its theme's; on paper the palette is light enough for black text."""

WIDE = 13.0
"""Inches of a figure with panels: twice a plain one, so that all text is of one size on the page."""

Line = dict[str, Any]


def figure(columns: int = 1, width: float = 6.4, height: float = 3.9) -> tuple[Figure, list[Axes]]:
    """A figure of its own canvas: pyplot would keep every one alive and look for a display."""
    fig = Figure(figsize=(width, height), layout="constrained")
    axes = list(np.ravel(fig.subplots(1, columns)))
    for each in axes:
        _style(each)
        each.grid(color=GRID, linewidth=0.7)
    return fig, axes


def _style(axes: Axes) -> None:
    axes.set_axisbelow(True)
    axes.set_facecolor("none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK, labelsize=9)
    for label in (axes.xaxis.label, axes.yaxis.label, axes.title):
        label.set_color(INK)
        label.set_fontsize(10)


def _legend(axes: Axes, **options: Any) -> None:
    axes.legend(fontsize=8.5, frameon=False, labelcolor=INK, **options)


def _look(g: int) -> dict[str, Any]:
    n = len(COLOURS)
    return {"color": COLOURS[g % n], "linestyle": STYLES[g % n], "marker": MARKERS[g % n], "markersize": 4}


def _note(axes: Axes, text: str, place: tuple[float, float], color: str = INK, **options: Any) -> None:
    axes.annotate(text, place, fontsize=8.5, color=color, **options)


def _number(value: float | None) -> float:
    return np.nan if value is None else value


def _positive(axis: Axis) -> bool:
    """Whether anything is drawn above zero; constant outputs have no FVU, and a log scale of nothing is refused."""
    return bool(np.isfinite(axis.get_minpos()))


def loss_curve(log: Sequence[Line]) -> Figure:
    """Training loss, and held-out FVU of every prefix, over training rows."""
    fig, (left, right) = figure(2, width=WIDE)
    lines = [line for line in log if line.get("loss") is not None]
    left.plot([line["rows"] / 1e6 for line in lines], [line["loss"] for line in lines], color=COLOURS[0])
    left.set(xlabel="training rows (million tokens)", ylabel="training loss (normalised units)")
    names = sorted({key for line in log for key in line if key.startswith("heldout_fvu/prefix_")})
    for g, name in enumerate(names):
        measured = [line for line in log if line.get(name) is not None]
        x, y = [line["rows"] / 1e6 for line in measured], [line[name] for line in measured]
        right.plot(x, y, **_look(g), label=f"prefix {name.rsplit('_', 1)[1]}")
    right.set(xlabel="training rows (million tokens)", ylabel="held-out FVU")
    if names:
        _legend(right)
    return fig


def fvu_by_prefix(prefixes: Sequence[Line], good: float, moderate: float, linear: float | None) -> Figure:
    """FVU of every prefix, with the verdicts' limits and the linear baseline."""
    fig, (axes,) = figure()
    places = range(len(prefixes))
    values = [_number(prefix["fvu"]) for prefix in prefixes]
    axes.bar(places, values, color=[COLOURS[g % len(COLOURS)] for g in places], width=0.62)
    for place, value in zip(places, values, strict=True):
        inside = {"xytext": (0, -4), "textcoords": "offset points", "ha": "center", "va": "top"}
        patch = {
            "facecolor": COLOURS[place % len(COLOURS)],
            "edgecolor": "none",
            "pad": 1.5,
        }  # over a limit's line
        _note(axes, f"{value:.3f}", (place, value), ON_BAR, weight="bold", bbox=patch, **inside)
    if linear is not None:
        axes.axhline(linear, color=INK, linewidth=1.2, label=f"best linear map: {linear:.3f}")
    axes.axhline(moderate, color=INK, linestyle="--", linewidth=1, label=f"moderate: below {moderate:g}")
    axes.axhline(good, color=INK, linestyle=":", linewidth=1.4, label=f"good: below {good:g}")
    axes.set_xticks(places, [f"{g}\n{p['end']:,} latents\nL0 {p['l0']:.1f}" for g, p in enumerate(prefixes)])
    axes.set(xlabel="prefix", ylabel="FVU (0 perfect, 1 the mean)")
    axes.grid(axis="x", visible=False)
    axes.margins(y=0.12)
    _legend(axes, loc="upper right")
    return fig


def fvu_against_l0(
    series: Mapping[str, Sequence[tuple[float, float | None]]], linear: float | None
) -> Figure:
    """Error against sparsity; `series`: name -> (L0, FVU) points, narrowest prefix first."""
    fig, (axes,) = figure()
    for index, (name, points) in enumerate(series.items()):
        x, y = zip(*((l0, _number(fvu)) for l0, fvu in points), strict=True)
        look = {**_look(index), "markersize": 6}
        axes.plot(x, y, **look, label=name)
        if index == 0 and len(points) > 1:
            for g, place in enumerate(zip(x, y, strict=True)):
                _note(axes, f"{g}", place, xytext=(5, 5), textcoords="offset points")
    if linear is not None:
        axes.axhline(linear, color=INK, linewidth=1.2, label=f"best linear map (dense): {linear:.3f}")
    axes.set(xlabel="active latents per row (L0)", ylabel="FVU (0 perfect, 1 the mean)")
    axes.set_xlim(left=0)
    axes.margins(y=0.15)
    _legend(axes)
    return fig


def l0_histogram(prefixes: Sequence[Line]) -> Figure:
    """Share of rows by number of active latents, one line per prefix."""
    fig, (axes,) = figure()
    for g, prefix in enumerate(prefixes):
        counts = np.asarray(prefix["l0_histogram"], dtype=float)
        look = {**_look(g), "marker": None}
        label = f"prefix {g}: mean {prefix['l0']:.1f}, median {prefix['l0_median']:g}"
        axes.step(np.arange(len(counts)), 100 * counts / counts.sum(), where="mid", label=label, **look)
    axes.set(xlabel="active latents per row (L0)", ylabel="rows (%)")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    _legend(axes)
    return fig


def density_bins(latents: Line, groups: Sequence[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Edges of the bins that are drawn, and log10 of each group's densities."""
    edges = np.asarray(latents["log10_density_edges"])
    logs = [np.log10(np.clip(density, 10 ** edges[0], 1)) for density in groups]
    low = max(edges[0], np.floor(min((log.min() for log in logs if len(log)), default=-1)))
    return edges[edges >= low - 1e-9], logs


def density_histogram(latents: Line, groups: Sequence[np.ndarray]) -> Figure:
    """Living latents by the share of rows on which they fire; `groups`: each group's densities, stacked."""
    fig, (axes,) = figure()
    edges, logs = density_bins(latents, groups)
    colours = [COLOURS[g % len(COLOURS)] for g in range(len(groups))]
    labels = [f"group {g}" for g in range(len(groups))]
    axes.hist(logs, bins=edges.tolist(), stacked=True, color=colours, label=labels)
    for limit, text in ((-2.0, "1 %"), (-1.0, "10 %")):
        axes.axvline(limit, color=INK, linestyle=":", linewidth=1)
        _note(axes, f" {text}", (limit, 0.97), xycoords=("data", "axes fraction"), va="top")
    axes.set(xlabel="log10 of the share of rows on which a latent fires", ylabel="latents")
    axes.set_title(f"{latents['dead']:,} of {latents['n']:,} never fired on {latents['rows']:,} rows")
    _legend(axes)
    return fig


def cosine_histogram(redundancy: Line) -> Figure:
    """Latents by the cosine of their decoder row to the nearest other one."""
    fig, (axes,) = figure()
    axes.stairs(
        redundancy["nearest_cosine_histogram"],
        redundancy["nearest_cosine_edges"],
        fill=True,
        color=COLOURS[0],
    )
    axes.axvline(redundancy["limit"], color=INK, linestyle=":", linewidth=1.2)
    _note(axes, " redundant", (redundancy["limit"], 0.97), xycoords=("data", "axes fraction"), va="top")
    axes.set(xlabel="cosine to the nearest other decoder row", ylabel="latents", xlim=(0, 1))
    return fig


def cross_entropy(prefixes: Sequence[Line]) -> Figure:
    """Cross-entropy recovered by every prefix, against both ablations."""
    fig, (axes,) = figure()
    places = np.arange(len(prefixes))
    for index, (key, name) in enumerate((("recovered_zero", "zero"), ("recovered_mean", "mean"))):
        values = [100 * _number(prefix["cross_entropy"][key]) for prefix in prefixes]
        bars = axes.bar(
            places + 0.2 * (2 * index - 1),
            values,
            0.38,
            color=COLOURS[index],
            hatch=("", "//")[index],
            edgecolor=ON_BAR,
            linewidth=0.5,
            label=f"against {name} ablation",
        )
        for bar, value in zip(bars, values, strict=True):
            _note(axes, f"{value:.1f}", (bar.get_x() + 0.19, max(value, 0)), ha="center", va="bottom")
    axes.axhline(100, color=INK, linewidth=1)
    axes.set_ylim(top=124)
    axes.set_xticks(places, [f"{g}\n{p['end']:,} latents" for g, p in enumerate(prefixes)])
    axes.set(xlabel="prefix", ylabel="cross-entropy recovered (%)")
    axes.grid(axis="x", visible=False)
    _legend(axes, loc="upper center", ncols=2)
    return fig


SPECIFICITY = {
    "density": ("rows on which it fires (%)", 100),
    "entropy": ("entropy of its tokens (bits)", 1),
    "top_share": ("share of its top token (%)", 100),
}
"""Measures of a latent: label, and what the values are shown times."""
QUANTILES = (5, 25, 50, 75, 95)


def specificity(groups: Sequence[dict[str, np.ndarray]]) -> Figure:
    """Are early groups more general? Living latents of each group by three measures: median, quartiles, 5-95 %."""
    fig, panels = figure(3, width=WIDE)
    for axes, (key, (label, scale)) in zip(panels, SPECIFICITY.items(), strict=True):
        for g, group in enumerate(groups):
            values = group[key] * scale
            if not len(values):
                continue
            low, first, middle, third, high = np.percentile(values, QUANTILES)
            colour = COLOURS[g % len(COLOURS)]
            axes.plot([g, g], [low, high], color=colour, linewidth=1.5)
            axes.plot([g, g], [first, third], color=colour, linewidth=9, solid_capstyle="butt")
            axes.plot(g, middle, marker="o", color="white", markeredgecolor=INK, markersize=6)
        axes.set(xlabel="group", ylabel=label, xticks=range(len(groups)))
        axes.margins(x=0.15)
        axes.grid(axis="x", visible=False)
    if _positive(panels[0].yaxis):
        panels[0].set_yscale("log")
    return fig


def group_shares(groups: Sequence[Line], prefixes: Sequence[Line]) -> dict[str, list[float]]:
    """What each group is of the whole, by measure; of no variance explained, none."""
    explained = np.diff([0.0, *(1 - _number(prefix["fvu"]) for prefix in prefixes)])
    parts = {
        "latents": [group["end"] - group["start"] for group in groups],
        "active per row": [group["l0"] for group in groups],
        "energy": [group["energy_share"] for group in groups],
        "variance explained\nby adding it": np.maximum(explained, 0).tolist(),
    }
    totals = {name: float(np.nansum(values)) or 1.0 for name, values in parts.items()}
    return {name: [float(value) / totals[name] for value in values] for name, values in parts.items()}


def group_contributions(groups: Sequence[Line], prefixes: Sequence[Line]) -> Figure:
    """What each group is of the whole: latents, active latents, energy, and explained variance added."""
    fig, (axes,) = figure()
    shares = group_shares(groups, prefixes)
    for row, values in enumerate(shares.values()):
        left = 0.0
        for g, value in enumerate(values):
            width = 100 * value
            axes.barh(row, width, left=left, color=COLOURS[g % len(COLOURS)], edgecolor="white", height=0.66)
            if width > 6:
                _note(axes, f"{width:.0f} %", (left + width / 2, row), ON_BAR, ha="center", va="center")
            left += width
    axes.set_yticks(range(len(shares)), list(shares))
    axes.invert_yaxis()
    axes.set(xlabel="share of the whole dictionary (%), groups coarse to fine", xlim=(0, 100))
    axes.grid(visible=False)
    return fig


def error_by_position(errors: Line) -> Figure:
    """FVU of every prefix by position in the context."""
    lines, edges = errors["by_position"], errors["position_edges"]
    centres = [(edges[line["class"]] + edges[line["class"] + 1] - 1) / 2 for line in lines]
    fig, (axes,) = figure()
    _fvu_lines(axes, centres, lines)
    axes.set(xlabel="position in the context (tokens)", ylabel="FVU")
    return fig


def size_centres(errors: Line) -> list[float]:
    """The middle of each class of distances from the mean, in root mean squares."""
    edges = errors["size_edges"]
    return [float(2 ** ((edges[line["class"]] + edges[line["class"] + 1]) / 2)) for line in errors["by_size"]]


def error_by_size(errors: Line) -> Figure:
    """FVU of every prefix by the output's distance from the mean, and which distances hold the error."""
    lines, centres = errors["by_size"], size_centres(errors)
    fig, (left, right) = figure(2, width=WIDE)
    _fvu_lines(left, centres, lines)
    left.set(xlabel="distance from the mean (1 = root mean square)", ylabel="FVU")
    rows = sum(line["rows"] for line in lines)
    for index, (name, values) in enumerate(
        {
            "rows": [line["rows"] / rows for line in lines],
            "squared error": [_number(line["error_share"]) for line in lines],
        }.items()
    ):
        right.plot(centres, 100 * np.asarray(values), **_look(index), label=name)
    right.set(xlabel="distance from the mean (1 = root mean square)", ylabel="share (%)")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        if _positive(axes.xaxis):
            axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    _legend(right)
    return fig


def error_by_dimension(errors: Line) -> Figure:
    """The output dimensions that hold most of the error."""
    lines = errors["by_dimension"]
    fig, (axes,) = figure()
    shares = [100 * _number(line["error_share"]) for line in lines]
    axes.bar(range(len(lines)), shares, color=COLOURS[0], width=0.7)
    axes.set_xticks(range(len(lines)), [str(line["class"]) for line in lines], rotation=90)
    axes.set(xlabel="output dimension, worst first", ylabel="share of the squared error (%)")
    axes.grid(axis="x", visible=False)
    return fig


def _fvu_lines(axes: Axes, x: Sequence[float], lines: Sequence[Line]) -> None:
    for g in range(len(lines[0]["fvu"]) if lines else 0):
        axes.plot(x, [_number(line["fvu"][g]) for line in lines], **_look(g), label=f"prefix {g}")
    axes.set_ylim(bottom=0)
    _legend(axes)


def by_layer(layers: Sequence[int], prefixes: Sequence[Sequence[float | None]], label: str) -> Figure:
    """One number of every layer, a line for each prefix; `prefixes`: its values by layer."""
    fig, (axes,) = figure()
    _layer_lines(axes, layers, prefixes, label)
    return fig


def cumulative(
    layers: Sequence[int], increases: Sequence[Sequence[float]], agreements: Sequence[Sequence[float]]
) -> Figure:
    """What is lost while more and more layers are replaced, from the first up; a line for each prefix."""
    fig, (left, right) = figure(2, width=WIDE)
    _layer_lines(left, layers, increases, "cross-entropy increase (nats per token)")
    shares = [[100 * each for each in own] for own in agreements]
    _layer_lines(right, layers, shares, "top-1 agreement with the original model (%)")
    right.set_ylim(top=100)
    for axes in (left, right):
        axes.set_xlabel("last layer replaced (with all below it)")
    return fig


def _layer_lines(
    axes: Axes, layers: Sequence[int], prefixes: Sequence[Sequence[float | None]], label: str
) -> None:
    for g, values in enumerate(prefixes):
        axes.plot(layers, [_number(value) for value in values], **_look(g), label=f"prefix {g}")
    axes.set(xlabel="layer", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    low, high = axes.get_ylim()
    below = any(_number(value) < 0 for values in prefixes for value in values)
    axes.set_ylim(min(0, low) if below else 0, high if high > 0 else 1)  # dead latents may be none
    _legend(axes)

"""The PNG plots: colour-blind-safe, labelled with units, readable in grey and on paper.

Okabe and Ito's palette, and a line style or marker besides the colour wherever several series meet.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))
MARKERS = "osD^vP"


def figure(width: float = 6.4, height: float = 3.8) -> tuple[Figure, Axes]:
    """A figure of its own canvas: pyplot would keep every one alive and look for a display."""
    made = Figure(figsize=(width, height), layout="constrained")
    axes = made.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#d8d8d8", linewidth=0.6)
    axes.set_axisbelow(True)
    return made, axes


def save(made: Figure, path: Path) -> None:
    aside = path.with_suffix(".tmp")
    made.savefig(aside, dpi=150, format="png", metadata={"Software": None})
    aside.replace(path)


def loss_curve(log: Sequence[dict[str, Any]]) -> Figure:
    """Training loss and held-out FVU over training rows, from metrics.jsonl."""
    made, left = figure()
    rows = [line["rows"] for line in log if "loss" in line]
    left.plot(rows, [line["loss"] for line in log if "loss" in line], color=COLOURS[0], label="training loss")
    left.set(xlabel="training rows (tokens)", ylabel="loss (normalised units)", yscale="log")
    names = sorted({key for line in log for key in line if key.startswith("heldout_fvu/prefix_")})
    if names:
        right = left.twinx()
        right.spines["top"].set_visible(False)
        for index, name in enumerate(names, start=1):
            points = [(line["rows"], line[name]) for line in log if line.get(name) is not None]
            x, y = zip(*points, strict=True) if points else ((), ())
            right.plot(
                x,
                y,
                color=COLOURS[index % len(COLOURS)],
                linestyle=STYLES[index % len(STYLES)],
                marker=MARKERS[index % len(MARKERS)],
                markersize=4,
                label=f"held-out FVU, prefix {name.rsplit('_', 1)[1]}",
            )
        right.set(ylabel="held-out FVU")
        right.set_ylim(bottom=0)
    made.legend(loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    return made


def fvu_by_prefix(prefixes: Sequence[dict[str, Any]], good: float, moderate: float) -> Figure:
    """Held-out FVU of every prefix, with the guide's two limits."""
    made, axes = figure()
    places = np.arange(len(prefixes))
    values = [prefix["fvu"] if prefix["fvu"] is not None else np.nan for prefix in prefixes]
    axes.bar(places, values, color=COLOURS[0], width=0.6)
    for place, value in zip(places, values, strict=True):
        axes.annotate(f"{value:.3f}", (place, value), ha="center", va="bottom", fontsize=9)
    axes.axhline(good, color=COLOURS[2], linestyle="--", linewidth=1.2, label=f"good: below {good:g}")
    axes.axhline(
        moderate, color=COLOURS[4], linestyle=":", linewidth=1.6, label=f"moderate: below {moderate:g}"
    )
    axes.set_xticks(places, [f"{g}\n{p['end']:,} latents\nL0 {p['l0']:.1f}" for g, p in enumerate(prefixes)])
    axes.set(xlabel="prefix", ylabel="held-out FVU (1 = the mean)")
    axes.grid(axis="x", visible=False)
    axes.legend(fontsize=8, frameon=False)
    return made


def l0_histogram(prefixes: Sequence[dict[str, Any]]) -> Figure:
    """Share of rows by number of active latents, one line per prefix."""
    made, axes = figure()
    for g, prefix in enumerate(prefixes):
        counts = np.asarray(prefix["l0_histogram"], dtype=float)
        axes.step(
            np.arange(len(counts)),
            100 * counts / counts.sum(),
            where="mid",
            color=COLOURS[g % len(COLOURS)],
            linestyle=STYLES[g % len(STYLES)],
            label=f"prefix {g}, mean {prefix['l0']:.1f}",
        )
    axes.set(xlabel="active latents per row (L0)", ylabel="rows (%)")
    axes.set_xlim(left=0)
    axes.legend(fontsize=8, frameon=False)
    return made


def density_histogram(latents: dict[str, Any]) -> Figure:
    """Living latents by log10 of the share of rows on which they fire."""
    made, axes = figure()
    edges = latents["log10_density_edges"]
    axes.stairs(latents["log10_density_histogram"], edges, fill=True, color=COLOURS[0], alpha=0.9)
    for limit, text in ((-2.0, "1 %"), (-1.0, "10 %")):
        axes.axvline(limit, color="#555555", linestyle=":", linewidth=1)
        axes.annotate(f" {text}", (limit, 0.97), xycoords=("data", "axes fraction"), va="top", fontsize=8)
    dead = f"{latents['dead']:,} of {latents['n']:,} latents never fired on {latents['rows']:,} rows"
    axes.set(xlabel="log10 of the share of rows on which a latent fires", ylabel="latents", title=dead)
    axes.title.set_fontsize(9)
    return made

"""Which plots there are, and each as a PNG on disk and as SVG in the page."""

import io
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from common.files import write_whole
from evaluate.files import LogLine
from evaluate.metrics.catalogue import Catalogue
from evaluate.records import Results
from evaluate.report import plots, plotted
from evaluate.report.verdicts import FVU_GOOD, FVU_MODERATE

Part = Literal["overview", "nesting", "error", "layers"]
"""The parts of a page that show plots; "layers" is of a layer set's."""


@dataclass(frozen=True)
class Plot:
    """One plot of the page, not yet drawn."""

    name: str
    """File name without suffix."""
    part: Part
    """Part of the page it stands in."""
    caption: str
    draw: Callable[[], Figure]
    numbers: Callable[[], plotted.Columns]
    """What it shows, as a table."""

    @property
    def file(self) -> str:
        """The PNG's name."""
        return f"{self.name}.png"


@dataclass(frozen=True)
class Drawn:
    """A plot as it stands in the page."""

    plot: Plot
    svg: str
    table: Markup
    """Its numbers."""
    wide: bool
    """Has panels side by side, and wants twice the room."""


def all_plots(results: Results, catalogue: Catalogue, log: list[LogLine]) -> Iterator[Plot]:
    """Every plot of a run's evaluation, in the order of the page."""
    prefixes = [prefix.written() for prefix in results.prefixes]
    latents, errors, linear = (
        results.latents.written(),
        results.errors.written(),
        results.baselines.linear and results.baselines.linear.fvu,
    )
    alive = [(catalogue.group == g) & (catalogue.firings > 0) for g in range(len(prefixes))]
    densities = [catalogue.density[-1][own] for own in alive]
    measures = [
        {
            "density": catalogue.density[-1][own],
            "entropy": catalogue.entropy[own],
            "top_share": catalogue.top_share[own],
        }
        for own in alive
    ]
    yield Plot(
        "fvu",
        "overview",
        "Error of every prefix",
        lambda: plots.fvu_by_prefix(prefixes, FVU_GOOD, FVU_MODERATE, linear),
        lambda: plotted.fvu_by_prefix(prefixes, linear),
    )
    yield Plot(
        "fvu_l0",
        "overview",
        "Error against sparsity",
        lambda: plots.fvu_against_l0(sparsity_series(results), linear),
        lambda: plotted.fvu_against_l0(sparsity_series(results), linear),
    )
    if log:  # none: an imported transcoder
        yield Plot(
            "loss", "overview", "Training", lambda: plots.loss_curve(log), lambda: plotted.loss_curve(log)
        )
    if results.prefixes[0].cross_entropy:
        yield Plot(
            "cross_entropy",
            "overview",
            "Language model's cross-entropy with the MLP replaced",
            lambda: plots.cross_entropy(prefixes),
            lambda: plotted.cross_entropy(prefixes),
        )
    yield Plot(
        "l0",
        "overview",
        "Active latents per row",
        lambda: plots.l0_histogram(prefixes),
        lambda: plotted.l0_histogram(prefixes),
    )
    yield Plot(
        "density",
        "overview",
        "How often latents fire",
        lambda: plots.density_histogram(latents, densities),
        lambda: plotted.density_histogram(latents, densities),
    )
    yield Plot(
        "cosine",
        "overview",
        "Nearest decoder rows",
        lambda: plots.cosine_histogram(results.redundancy.written()),
        lambda: plotted.cosine_histogram(results.redundancy.written()),
    )
    yield Plot(
        "groups",
        "nesting",
        "Shares of the groups",
        lambda: plots.group_contributions([group.written() for group in results.latents.groups], prefixes),
        lambda: plotted.group_contributions([group.written() for group in results.latents.groups], prefixes),
    )
    yield Plot(
        "specificity",
        "nesting",
        "Are early groups more general? (dot: median, bar: quartiles, line: 5 to 95 %)",
        lambda: plots.specificity(measures),
        lambda: plotted.specificity(measures),
    )
    yield Plot(
        "error_size",
        "error",
        "Error by distance from the mean output",
        lambda: plots.error_by_size(errors),
        lambda: plotted.error_by_size(errors),
    )
    yield Plot(
        "error_position",
        "error",
        "Error by position in the context",
        lambda: plots.error_by_position(errors),
        lambda: plotted.error_by_position(errors),
    )
    yield Plot(
        "error_dimension",
        "error",
        "Output dimensions with most error",
        lambda: plots.error_by_dimension(errors),
        lambda: plotted.error_by_dimension(errors),
    )


def sparsity_series(results: Results) -> dict[str, list[tuple[float, float | None]]]:
    """name -> (L0, FVU) of every prefix, for the threshold, training's selection, and a one-group run."""
    prefixes = results.prefixes
    series = {"prefixes, threshold": [(prefix.l0, prefix.fvu) for prefix in prefixes]}
    if training := [prefix.training_selection for prefix in prefixes if prefix.training_selection]:
        series["prefixes, training selection"] = [(each.l0, each.fvu) for each in training]
    if one_group := results.baselines.one_group:
        series["one group, not nested"] = [(one_group.l0, one_group.fvu)]
    return series


def save(figure: Figure, path: Path) -> str:
    """Write the figure as a PNG, whole; returns it as an SVG element in the page's colours.

    Laid out once and drawn once in each format: two calls of `savefig` do both twice (0.57 against 0.36 s).
    """
    figure.dpi = 150
    canvas = FigureCanvasAgg(figure)
    if (layout := figure.get_layout_engine()) is not None:
        layout.execute(figure)
        figure.set_layout_engine("none")
    png = io.BytesIO()
    figure.set_facecolor("white")
    canvas.print_png(png, metadata={"Software": None})
    write_whole(path, png.getvalue())
    buffer = io.StringIO()
    figure.set_facecolor("none")
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "evaluate"}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    return _themed(buffer.getvalue())


def _themed(text: str) -> str:
    """The SVG element of a document, its palette and ink as CSS variables."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text.replace(plots.INK, "currentColor").replace(plots.GRID, "var(--line)")
    text = text.replace(plots.ON_BAR, "var(--card)").replace("#ffffff", "var(--card)")
    for g, colour in enumerate(plots.COLOURS):
        text = text.replace(colour, f"var(--g{g})")
    return re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px system-ui, sans-serif", text)


def draw(results: Results, catalogue: Catalogue, log: list[LogLine], folder: Path) -> list[Drawn]:
    """Draws every plot of a run's evaluation, and saves each as <name>.png in `folder`."""
    return draw_each(all_plots(results, catalogue, log), folder)


def draw_each(plots: Iterable[Plot], folder: Path) -> list[Drawn]:
    """Draws each, and saves it as <name>.png in `folder`."""
    drawn = []
    for plot in plots:
        figure = plot.draw()
        svg, table = save(figure, folder / plot.file), plotted.table(plot.name, plot.numbers())
        drawn.append(Drawn(plot, svg, table, len(figure.axes) > 1))
    return drawn

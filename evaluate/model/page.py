"""model.html: the set on one page, with a plot for every number by layer. It needs no script."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from common.files import write_whole
from common.numbers import MARK, Uncertain, aligned, number_or_dash
from evaluate.model.records import LayerMetrics, LayerPrefix, ModelMetrics, ReplacedMetrics
from evaluate.report import plots, plotted
from evaluate.report.figures import Drawn, Plot, draw_each
from evaluate.report.report import elements
from evaluate.report.templates import html


def draw_plots(result: ModelMetrics, folder: Path) -> list[Drawn]:
    """Draws every plot and saves it as model_<name>.png in `folder`."""
    return draw_each(_plots(result), folder)


def _plots(result: ModelMetrics) -> Iterator[Plot]:
    """Those of all MLPs replaced ("overview"), and those by layer ("layers"), in the order of the page."""
    replaced, layers = result.replaced, result.layers
    if isinstance(replaced, ReplacedMetrics):
        yield Plot(
            "model_cumulative",
            "overview",
            "Layers replaced cumulatively, from the first",
            lambda: plots.cumulative(result.provenance.layers, *_cumulative(replaced)),
            lambda: plotted.cumulative(result.provenance.layers, *_cumulative(replaced)),
        )
    heavy = [layer.layer for layer in layers if layer.heavy_rows]
    for name, words, label, value in BY_LAYER:
        caption = words + f", without heavy rows in {spans(heavy)}" * (name == "fvu" and bool(heavy))
        values = [[value(layer.prefixes[g]) for layer in layers] for g in range(len(layers[0].prefixes))]
        if any(each is not None for own in values for each in own):
            own = ([layer.layer for layer in layers], values, label)
            yield Plot(f"model_{name}", "layers", caption, *_by_layer(*own))


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def typical(prefix: LayerPrefix) -> float | None:
    """The FVU, without heavy rows where the layer has some."""
    return prefix.fvu if prefix.fvu_typical is None else prefix.fvu_typical


Value = Callable[[LayerPrefix], float | None]
BY_LAYER: tuple[tuple[str, str, str, Value], ...] = (
    (
        "alone",
        "Only this MLP replaced",
        "cross-entropy increase (nats per token)",
        lambda prefix: prefix.increase,
    ),
    (
        "recovered",
        "Cross-entropy recovered, only this MLP replaced",
        "share of what zeroing costs (%)",
        lambda prefix: _percent(prefix.recovered_zero),
    ),
    ("fvu", "Error", "FVU (0 perfect, 1 the mean)", lambda prefix: typical(prefix)),
    ("l0", "Active latents", "active latents per row (L0)", lambda prefix: prefix.l0),
    ("dead", "Dead latents", "latents that never fired (%)", lambda p: _percent(p.dead_fraction)),
    (
        "over_10_percent",
        "Latents that fire on more than 10 % of the rows",
        "of the prefix's latents (%)",
        lambda prefix: _percent(prefix.over_10_percent_fraction),
    ),
)
"""Name, caption, label and value of each plot by layer."""


def _by_layer(
    layers: Sequence[int], values: list[list[float | None]], label: str
) -> tuple[Callable[[], Figure], Callable[[], plotted.Columns]]:
    return lambda: plots.by_layer(layers, values, label), lambda: plotted.by_layer(layers, values, label)


def _cumulative(replaced: ReplacedMetrics) -> tuple[list[list[float]], list[list[float]]]:
    """Increase, and top-1 agreement, of each prefix by last layer replaced."""
    own = [
        [line for line in replaced.first.cumulative if line.prefix == g]
        for g in range(len(replaced.prefixes))
    ]
    return [[line.increase for line in lines] for lines in own], [
        [line.top1_agreement for line in lines] for lines in own
    ]


def write_page(path: Path, result: ModelMetrics, drawn: list[Drawn]) -> None:
    """The page of what was measured; `drawn`: its plots."""
    replaced = result.replaced if isinstance(result.replaced, ReplacedMetrics) else None
    n_prefixes = len(result.layers[0].prefixes)
    page = html(
        "model.html",
        result=result,
        provenance=result.provenance,
        title=title(result),
        replaced=replaced,
        n_prefixes=n_prefixes,
        ends=[end_of(result.layers, g) for g in range(n_prefixes)],
        steps={(line.prefix, line.layer): line for line in replaced.first.cumulative} if replaced else {},
        highest=max((line.increase for line in replaced.first.cumulative), default=0) or 1 if replaced else 1,
        notes=notes(result),
        heavy=heavy_note(result.layers, -1),
        tokens=alone_tokens(result.layers),
        typical=typical,
        mark=MARK,
        recovered=[_column(result.layers, g, _recovered) for g in range(n_prefixes)],
        increases=[_column(result.layers, g, _increase) for g in range(n_prefixes)],
        figures=lambda part: elements([each for each in drawn if each.plot.part == part]),
    )
    write_whole(path, page.encode())


def _column(
    layers: Sequence[LayerMetrics], g: int, cell: Callable[[LayerPrefix], Uncertain | str]
) -> dict[int, str]:
    """What a prefix's column says of each layer, with as many decimals everywhere."""
    cells = aligned([cell(layer.prefixes[g]) for layer in layers])
    return {layer.layer: text for layer, text in zip(layers, cells, strict=True)}


def _increase(prefix: LayerPrefix) -> Uncertain | str:
    return "–" if prefix.increase is None else Uncertain(prefix.increase, prefix.increase_error)


def _recovered(prefix: LayerPrefix) -> str:
    error = prefix.recovered_zero_error
    text = number_or_dash(_percent(prefix.recovered_zero), ".1f", "–")
    return text if error is None or prefix.recovered_zero is None else f"{text} ± {100 * error:.1f}"


def alone_tokens(layers: Sequence[LayerMetrics]) -> str | None:
    """On how many tokens each MLP alone was replaced, in words; none where no layer was measured."""
    counts = {layer.positions for layer in layers if layer.positions is not None}
    if not counts:
        return None
    return f"{min(counts):,} tokens" if len(counts) == 1 else f"{min(counts):,} to {max(counts):,} tokens"


def heavy_note(layers: Sequence[LayerMetrics], g: int) -> str | None:
    """What the mark at an FVU of prefix `g` is, with the FVU of all rows; none where no layer has heavy rows."""
    said = [
        f"layer {layer.layer} {number_or_dash(layer.prefixes[g].fvu)} ({layer.heavy_rows:,} "
        f"row{'s' * (layer.heavy_rows > 1)}, {100 * (layer.heavy_variance or 0):.1f} % of the variance)"
        for layer in layers
        if layer.prefixes[g].fvu_typical is not None
    ]
    which = len(layers[0].prefixes) - 1 if g < 0 else g
    return f"{MARK} FVU without heavy rows; of all rows, prefix {which}: {', '.join(said)}" if said else None


def title(result: ModelMetrics) -> str:
    """Which layers are in the set: all, or those that it has."""
    layers, n = result.provenance.layers, result.provenance.n_layers
    return f"all {n} layers" if len(layers) == n else f"{spans(layers)} of {n} layers"


def spans(layers: Sequence[int]) -> str:
    """Layers in words: layer 3, or layers 0-2, 5, 7-9."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    words = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"layer{'s' * (len(layers) != 1)} {', '.join(words)}"


def end_of(layers: Sequence[LayerMetrics], g: int) -> str:
    """Latents of a prefix in one layer; the smallest and the largest where layers differ."""
    ends = sorted({layer.prefixes[g].end for layer in layers})
    return f"{ends[0]:,}" if len(ends) == 1 else f"{ends[0]:,}–{ends[-1]:,}"


def notes(result: ModelMetrics) -> list[str]:
    """What a reader must know to compare the layers: each a sentence; none where all is alike."""
    said = []
    layers = result.layers
    if len({layer.rows for layer in layers}) > 1:
        few, many = min(layer.rows for layer in layers), max(layer.rows for layer in layers)
        said.append(f"The layers were evaluated on different numbers of rows: {few:,} to {many:,}.")
    if without := [layer.layer for layer in layers if layer.positions is None]:
        said.append(f"Without cross-entropy of its own: {spans(without)}.")
    if len({layer.positions for layer in layers if layer.positions is not None}) > 1:
        said.append(
            "The cross-entropy with only one MLP replaced was measured on different numbers of tokens."
        )
    if other := result.provenance.other_text:
        first = result.provenance.contexts_of_layer
        said.append(f"Harvested from another text, or more of it, than layer {first}: {spans(other)}.")
    return said

"""python -m evaluate.model: the runs of one name in all layers on one page, and all MLPs replaced at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from common.cli import load, parser, run_stage
from common.errors import InputError
from common.numbers import Uncertain, marked_fvu, number_or_dash
from common.settings import Settings
from evaluate.report.console import plain, split_name, table_of

if TYPE_CHECKING:  # --help does not wait for the records
    from evaluate.model.records import ModelMetrics, ReplacedMetrics

TOKENS = 1024
"""On which all MLPs are replaced, unless told otherwise: 147 s of one core for SmolLM2-135M's 30 layers, 3 prefixes."""
ALL = "all"


def main() -> None:
    options = parser(
        "evaluate.model",
        "Show the runs of one name in all layers on one page, and measure the model with all MLPs replaced at once.",
    )
    options.add_argument(
        "--tokens",
        type=int,
        default=TOKENS,
        metavar="N",
        help="tokens on which to measure the model with MLPs replaced (a quarter of them for cumulative losses); 0: do "
        "not run the language model [%(default)s]",
    )
    settings, arguments = load(
        options, n_layers=lambda _: 0
    )  # of all: describe asks the stores, not the model
    if arguments.tokens < 0:
        raise InputError(f"command line: --tokens: expected a number from 0, found {arguments.tokens}")
    from common.terminal.table import console
    from evaluate.model.run import describe  # after the settings are checked: torch takes seconds to import
    from transcoder.weights import chosen_run

    whole = (arguments.layer or "").replace(",", " ").split() == [ALL]
    if not arguments.layer:  # not the profile's own layer
        settings = settings.model_copy(update={"layers": ()})
    settings = chosen_run(settings, arguments.run, every_layer=True)
    show(settings, *describe(settings, arguments.tokens, whole), console())


def show(settings: Settings, result: ModelMetrics, fresh: bool, console: Console) -> None:
    """A line for each layer, all MLPs replaced at once, which prefix suffices, and the paths."""
    from evaluate.model.page import notes
    from evaluate.model.records import ReplacedMetrics
    from evaluate.model.run import PAGE

    replaced = result.replaced
    _layers(result, console)
    if isinstance(replaced, ReplacedMetrics):
        _replaced(result, replaced, console)
        _sufficient(result, console)
        worst = max(line.largest_difference for line in replaced.first.with_error_terms)
        plain(console, f"with error terms: the original model, largest difference of a logit {worst:.1e}")
    else:
        plain(console, f"all MLPs replaced at once: not measured: {replaced.skipped}")
    for note in notes(result):
        plain(console, f"note: {note}")
    if not fresh:
        plain(console, "nothing has changed since the last time: nothing was measured again")
    plain(console, f"page {settings.set_dir() / PAGE}")


def _layers(result: ModelMetrics, console: Console) -> None:
    """Each layer's last prefix."""
    from evaluate.model.page import alone_tokens, end_of, heavy_note, title
    from evaluate.model.records import ReplacedMetrics

    of, replaced = result.provenance, result.replaced
    g = len(result.layers[0].prefixes) - 1
    table = table_of(
        f"run {of.run}, {title(result)} of {of.model}: prefix {g} ({end_of(result.layers, g)} latents), "
        f"{split_name(of.split)} rows",
        ("layer", "FVU", "L0", "dead %", "over 10 %", "recovered %", "alone (nats)", "cumulative (nats)"),
    )
    steps = (
        {line.layer: line.increase for line in replaced.first.cumulative if line.prefix == g}
        if isinstance(replaced, ReplacedMetrics)
        else {}
    )
    for layer in result.layers:
        own = layer.prefixes[g]
        recovered = None if own.recovered_zero is None else 100 * own.recovered_zero
        table.add_row(
            str(layer.layer),
            marked_fvu(own.fvu, own.fvu_typical),
            f"{own.l0:.1f}",
            f"{100 * own.dead_fraction:.1f}",
            f"{100 * own.over_10_percent_fraction:.1f}",
            number_or_dash(recovered, ".1f"),
            "-" if own.increase is None else Uncertain(own.increase, own.increase_error),
            number_or_dash(steps.get(layer.layer), "+.3f"),
        )
    tokens = alone_tokens(result.layers)
    measured = tokens and f"alone: only this MLP replaced, {tokens} of its own evaluation, ± standard error"
    table.caption = "\n".join(line for line in (heavy_note(result.layers, g), measured) if line)
    console.print(table)


def _replaced(result: ModelMetrics, replaced: ReplacedMetrics, console: Console) -> None:
    which = f"all {len(result.layers)} MLPs" if len(result.layers) > 1 else "the one MLP"
    table = table_of(
        f"{which} replaced at once, {replaced.positions:,} tokens, cross-entropy (CE) and KL in nats per token",
        ("", "latents", "L0", "CE", "increase", "KL", "top-1 %", "recovered %", "against mean %"),
    )
    changed = {"zeroed": replaced.zero, "at their mean": replaced.mean}
    table.add_row("original model", "", "", f"{replaced.clean:.3f}", "", "", "", "", "")
    for g, each in enumerate(replaced.prefixes):
        shares = [None if s is None else 100 * s for s in (each.recovered_zero, each.recovered_mean)]
        table.add_row(
            f"prefix {g}",
            f"{each.latents:,}",
            f"{each.l0:,.0f}",
            f"{each.cross_entropy:.3f}",
            f"{each.increase:+.3f}",
            f"{each.kl:.3f}",
            f"{100 * each.top1_agreement:.1f}",
            *(number_or_dash(share, ".1f") for share in shares),
        )
    for name, each in changed.items():
        table.add_row(
            name,
            "",
            "",
            f"{each.cross_entropy:.3f}",
            f"{each.cross_entropy - replaced.clean:+.3f}",
            f"{each.kl:.3f}",
            f"{100 * each.top1_agreement:.1f}",
            "",
            "",
        )
    console.print(table)


def _sufficient(result: ModelMetrics, console: Console) -> None:
    table = table_of(
        "which prefix suffices for what loss",
        ("nats more, less than", "all at once", "latents", "L0", "layers from the first"),
    )
    for each in result.sufficient:
        table.add_row(
            f"{each.limit:g}",
            "none" if each.prefix is None else f"prefix {each.prefix}",
            number_or_dash(each.latents, ","),
            number_or_dash(each.l0, ",.0f"),
            " / ".join(map(str, each.layers_from_the_first)),
        )
    console.print(table)


if __name__ == "__main__":
    run_stage(main)

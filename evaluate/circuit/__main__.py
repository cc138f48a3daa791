"""python -m evaluate.circuit --run name --text "...": the strongest paths between latents of every layer on a text."""

import argparse
from typing import TYPE_CHECKING

from common.cli import load, parser, run_stage
from common.errors import InputError
from common.tokens import printable

if TYPE_CHECKING:
    from evaluate.circuit.graph import Circuit, Route
    from evaluate.circuit.labels import Label

N_NODES = 1000
SHOWN = 8
"""Paths printed."""


def _options() -> argparse.ArgumentParser:
    options = parser(
        "evaluate.circuit",
        "Trace a prompt: an attribution graph from its tokens, through latents of all layers, to the next token.",
    )
    options.add_argument("--text", required=True, help="the prompt, a few words or more")
    options.add_argument("--prefix", type=int, help="prefix of every transcoder, counted from 0 [the last]")
    options.add_argument(
        "--nodes",
        type=int,
        default=N_NODES,
        help=f"latents traced back to their sources, at most [{N_NODES}]",
    )
    return options


def main() -> None:
    settings, arguments = load(
        _options(), n_layers=lambda settings: 0
    )  # all: those that there are, and none missing
    if arguments.nodes < 0:
        raise InputError(f"nodes: expected a number from 0, found {arguments.nodes}")
    from evaluate.circuit.run import trace  # with torch, which --help need not wait for
    from transcoder.weights import chosen_run

    if not arguments.layer:  # not the profile's own layer
        settings = settings.model_copy(update={"layers": ()})
    settings = chosen_run(settings, arguments.run, every_layer=True)
    traced = trace(settings, arguments.text, arguments.prefix, arguments.nodes)
    _print(traced.circuit, traced.labels, traced.routes)
    print(traced.folder / "circuit.html")


def _print(circuit: "Circuit", labels: "list[Label]", routes: "dict[int, list[Route]]") -> None:
    from common.terminal.table import Table, console
    from evaluate.circuit.write import place
    from evaluate.report.templates import percent

    probability = {logit: float(circuit.nodes.value[logit]) for logit in routes}
    found = [(logit, route) for logit, some in routes.items() for route in some]
    found.sort(key=lambda each: -abs(each[1].weight) * probability[each[0]])
    table = Table("weight %", "next token", "path (layer/latent@token)", "labels")
    for logit, route in found[:SHOWN]:
        steps = route.nodes[:-1]
        first = [percent(route.weight), printable(repr(labels[logit].word))]
        second = ["", f"{percent(probability[logit])} %"]
        for number, node in enumerate(steps):  # a row for each: a label that takes two lines moves no other
            begin = first if number == 0 else second if number == 1 else ["", ""]
            table.add_row(*begin, place(circuit, node), printable(labels[node].text))
        if len(steps) < 2:
            table.add_row(*second, "", "")
        table.add_section()
    console(markup=False, emoji=False, highlight=False).print(table)
    ends = circuit.ends
    print(
        f"influence on the logits: {percent(ends.tokens)} % from the tokens through latents and attention, "
        f"{percent(ends.errors)} % from errors (what no latent reconstructs), "
        f"{percent(ends.not_followed)} % from latents not followed (--nodes)"
    )
    print(f"{len(circuit.nodes)} nodes and {len(circuit.source)} edges are kept")


if __name__ == "__main__":
    run_stage(main)

"""A stage over the layers asked for: each with the settings that it has alone, one run name for all.

A layer that fails says why, with its number, and the others go on; at the end a table of all, and the failed ones in
one line. A defect, and Ctrl-C, stop the set where it is; the same command continues.
"""

import argparse
import gc
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from common.cli import Asked, mendable
from common.errors import InputError
from common.layers import spread
from common.numbers import HEAVY, MARK, Uncertain
from common.settings import Settings

Line = Mapping[str, str | Uncertain]
"""Column -> what the table at the end says of a layer there."""


@dataclass(frozen=True)
class Launch:
    """That common.launch is to start the processes."""

    processes: int
    stage: str
    """Its module."""
    together: Callable[[], None]
    """Start the stage, with its command line as it is, in all processes at once."""
    options: tuple[str, ...] = ()
    """Of common.launch, for each layer that it starts."""
    one_node: bool = True


launch: Launch | None = None
"""Set by common.launch before it calls a stage."""


def add_spread(options: argparse.ArgumentParser) -> None:
    """Give a stage the option --spread."""
    options.add_argument(
        "--spread",
        choices=["rows", "layers"],
        default="rows",
        help="what NPROC=n processes share: the rows of one layer after another, or the layers, each trained or "
        "measured by one process [%(default)s]",
    )


def over_layers(
    asked: Asked,
    one: Callable[[Settings, bool], None],
    *,
    n_layers: Callable[[Settings], int],
    chosen: Callable[[Settings], Settings] = lambda settings: settings,
    lines: Callable[[Settings], Sequence[Line]] = lambda _: (),
) -> None:
    """Call `one` for each layer asked for, with its settings and whether there are others.

    `n_layers`: of the model, for LAYER=all. `chosen`: picks the run, once for all layers. `lines`: what the table at
    the end says of a layer that is done. Raises `InputError` naming the layers that failed.
    """
    layers = asked.layers(n_layers)
    settings = asked.settings(layers)
    apart = launch is not None and asked.arguments.spread == "layers"
    if not layers or (len(layers) == 1 and not apart):  # of none the stage says that it needs one
        if launch is not None:
            launch.together()
        else:
            one(chosen(settings), False)
        return
    _refuse_a_rank()
    if launch is not None and not launch.one_node:
        raise InputError(
            "NODES: several nodes work on one layer; give one LAYER for each command, or give each node layers of "
            "its own, without NODES and HEAD"
        )
    settings = chosen(settings)
    if launch is None or launch.processes == 1:
        failed = _one_after_another(asked, settings, one)
    else:
        failed = _in_processes(settings, launch, apart)
    done = [layer for layer in layers if layer not in failed]
    _print_table(
        settings.run, [(layer, line) for layer in done for line in lines(asked.alone(layer, settings.run))]
    )
    if failed:
        raise InputError(
            f"{len(failed)} of {len(layers)} layers failed ({' '.join(map(str, failed))}), as said above; the same "
            "command tries them again"
        )


def _refuse_a_rank() -> None:
    """A torchrun of the user's own would have to agree on which layer has failed."""
    from common.processes import world

    if world() > 1:
        raise InputError(
            "layer: several layers in processes that torchrun has started; give one layer to each torchrun, or let "
            "NPROC=n (python -m common.launch n) start them"
        )


def _one_after_another(asked: Asked, settings: Settings, one: Callable[[Settings, bool], None]) -> list[int]:
    failed: list[int] = []
    for number, layer in enumerate(settings.layers, 1):
        print(f"layer {layer} ({number} of {len(settings.layers)})", flush=True)
        try:
            one(asked.alone(layer, settings.run), True)
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt(
                f"layer {layer}: {str(interrupt) or 'the same command continues'}"
            ) from None
        except Exception as error:
            if (line := mendable(error)) is None:
                error.add_note(f"layer {layer} stopped the set; the same command continues with it")
                raise
            print(f"error: layer {layer}: {line}", file=sys.stderr, flush=True)
            failed.append(layer)
        gc.collect()  # what is left in cycles of a layer, a language model too, before the next is loaded
    return failed


def _in_processes(settings: Settings, start: Launch, apart: bool) -> list[int]:
    """`apart`: each layer in a process of its own, else one layer after another in all of them."""
    own = [start.stage] if apart else ["common.launch", *start.options, str(start.processes), start.stage]
    commands = {
        layer: [*own, *sys.argv[1:], f"--layer={layer}", f"--run={settings.run}", "--spread=rows"]
        for layer in settings.layers
    }
    return spread.each(commands, start.processes if apart else 1)


def _print_table(run: str, lines: Sequence[tuple[int, Line]]) -> None:
    if not lines:
        return
    from common.terminal.table import Table, console

    table = Table("layer", *lines[0][1], title=f"run {run}")
    if any(str(cell).endswith(MARK) for _, line in lines for cell in line.values()):
        table.caption = HEAVY
    for layer, line in lines:
        table.add_row(str(layer), *line.values())
    console().print(table)

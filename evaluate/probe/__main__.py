"""python -m evaluate.probe: what a few latents of each prefix tell of tokens and documents (k-sparse probing)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.cli import parser, read, run_stage
from common.layers.driver import add_spread, over_layers
from common.settings import Settings
from common.terminal.table import console
from evaluate.probe.console import show, table_lines
from transcoder.layers import chosen_run, n_layers

if TYPE_CHECKING:
    from collections.abc import Sequence


def main() -> None:
    options = parser("evaluate.probe", (__doc__ or "").partition(": ")[2])
    add_spread(options)
    asked = read(options)
    named = asked.arguments.run

    def one(settings: Settings, _: bool) -> None:
        from evaluate.probe.run import probe  # imports torch and scikit-learn, which --help need not wait for

        show(*probe(settings), console())

    over_layers(asked, one, n_layers=n_layers, chosen=lambda each: chosen_run(each, named), lines=_lines)


def _lines(settings: Settings) -> Sequence[dict[str, str]]:
    """What the table of several layers says of one: as another process may have measured it, from its file."""
    from evaluate.probe.run import written

    return table_lines(written(settings))


if __name__ == "__main__":
    run_stage(main)

"""python -m evaluate.probe: what a few latents of each prefix tell of tokens and documents (k-sparse probing)."""

from __future__ import annotations

from common.cli import parser, read, run_stage
from common.layers.driver import add_spread, over_layers
from common.settings import Settings
from common.terminal.table import console
from evaluate.probe.console import show, table_lines
from transcoder.layers import n_layers


def main() -> None:
    options = parser("evaluate.probe", (__doc__ or "").partition(": ")[2])
    add_spread(options)
    asked = read(options)
    named = asked.arguments.run

    def chosen(settings: Settings) -> Settings:
        from transcoder.weights import chosen_run

        return chosen_run(settings, named, every_layer=len(settings.layers) > 1)

    def one(settings: Settings, _: bool) -> None:
        from evaluate.probe.run import probe  # imports torch and scikit-learn, which --help need not wait for

        show(*probe(settings), console())

    over_layers(asked, one, n_layers=n_layers, chosen=chosen, lines=_lines)


def _lines(settings: Settings) -> list[dict[str, str]]:
    """What the table of several layers says of one that is probed."""
    from evaluate.probe.run import probe

    return table_lines(probe(settings)[0])


if __name__ == "__main__":
    run_stage(main)

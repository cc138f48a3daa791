"""python -m evaluate.absorption: absorption and splitting of a run's latents, and their stability beside other runs."""

from __future__ import annotations

from common.cli import parser, read, run_stage
from common.layers.driver import add_spread, over_layers
from common.numbers import number_or_dash
from common.settings import Settings
from common.terminal.table import console
from evaluate.absorption import FILE
from evaluate.absorption.records import Absorption
from evaluate.compare import add_others, chosen_run_of
from transcoder.layers import n_layers


def main() -> None:
    options = parser(
        "evaluate.absorption",
        "Measure absorption and splitting of a run's latents; with --with, also how many of them others have.",
    )
    add_others(options)
    add_spread(options)
    asked = read(options)
    named, others = asked.arguments.run, asked.arguments.others

    def one(settings: Settings, _: bool) -> None:
        from evaluate.absorption.run import absorption, show

        show(*absorption(settings, others), console())

    over_layers(
        asked, one, n_layers=n_layers, chosen=lambda each: chosen_run_of(each, named, others), lines=_lines
    )


def _lines(settings: Settings) -> list[dict[str, str]]:
    """What the table of several layers says of one: every transcoder's full dictionary."""
    found = Absorption.model_validate_json((settings.run_dir() / FILE).read_bytes())
    full = {each.transcoder: each.prefixes[-1] for each in found.transcoders}
    return [
        {
            "transcoder": name,
            "FVU": number_or_dash(each.fvu),
            "absorbed %": number_or_dash(each.absorbed and 100 * each.absorbed.value, ".1f"),
            "split": number_or_dash(each.latents and each.latents.value, ".2f"),
        }
        for name, each in full.items()
    ]


if __name__ == "__main__":
    run_stage(main)

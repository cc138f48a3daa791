"""python -m harvest: run the language model once and write activation stores."""

import argparse

from common.cli import parser, read, run_stage
from common.settings import Settings


def main() -> None:
    options = parser("harvest", "Run the language model once and write its (input, output) activations.")
    options.add_argument("--force", action="store_true", help="harvest even if the disk looks too small")
    options.add_argument("--plan", action="store_true", help="print what the harvest would take and exit")
    options.add_argument(
        "--refill", action="store_true", help="harvest train rows again that were removed after training"
    )
    # make: SPREAD=layers is not for it
    options.add_argument("--spread", choices=["rows"], help=argparse.SUPPRESS)
    asked = read(options)
    arguments, settings = asked.arguments, asked.settings(asked.layers(_n_layers))
    if arguments.plan:
        from harvest.plan import plan_only  # after the settings are checked: torch takes seconds to import

        plan_only(settings)
    elif settings.harvest.keep == "layer":
        from harvest.by_layer import by_layer

        by_layer(asked, settings)
    else:
        from common.device import share_cores
        from harvest.run import harvest

        share_cores()
        harvest(settings, force=arguments.force, refill=arguments.refill)


def _n_layers(settings: Settings) -> int:
    """Of the model, by its configuration, for LAYER=all."""
    from harvest import lm

    return lm.shape(lm.locate(settings.model), settings.model.revision).n_layers


if __name__ == "__main__":
    run_stage(main)

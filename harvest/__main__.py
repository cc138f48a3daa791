"""python -m harvest: run the language model once and write activation stores."""

from common.cli import load, parser, run_stage
from common.settings import Settings


def main() -> None:
    options = parser("harvest", "Run the language model once and write its (input, output) activations.")
    options.add_argument("--force", action="store_true", help="harvest even if the disk looks too small")
    options.add_argument("--plan", action="store_true", help="print what the harvest would take and exit")
    settings, arguments = load(options, n_layers=_n_layers)
    from harvest.run import (
        harvest,
        plan_only,
    )  # after the settings are checked: torch takes seconds to import

    if arguments.plan:
        plan_only(settings)
    else:
        from common.device import share_cores

        share_cores()
        harvest(settings, force=arguments.force)


def _n_layers(settings: Settings) -> int:
    """Of the model, by its configuration, for LAYER=all."""
    from harvest import lm

    return lm.shape(lm.locate(settings.model), settings.model.revision).n_layers


if __name__ == "__main__":
    run_stage(main)

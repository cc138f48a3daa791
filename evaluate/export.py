"""python -m evaluate.export --layer 17 --run name --format saelens [--prefix 0]: a run in other tools' formats."""

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path

from common.cli import parser, read, run_stage
from common.errors import InputError
from common.layers.driver import over_layers
from common.settings import Settings

HANDED_OVER = ("delphi", "neuronpedia")
"""Formats that hold what a run does on text, not its weights."""


def known_format(name: str) -> str:
    """`name`, if it is a format's."""
    from transcoder.export import FORMATS  # with torch, which --help need not wait for

    names = (*FORMATS, *HANDED_OVER)
    if name not in names:
        raise ArgumentTypeError(f"invalid choice: {name!r} (choose from {', '.join(map(repr, names))})")
    return name


def main() -> None:
    asked = read(_options())
    arguments = asked.arguments
    _refuse_options(arguments)
    from transcoder import weights
    from transcoder.export import export

    sets = arguments.format in ("circuit_tracer", *HANDED_OVER)

    def chosen(settings: Settings) -> Settings:
        return weights.chosen_run(settings, arguments.run, every_layer=sets or None)

    def one(settings: Settings, _: bool) -> None:
        weights.refuse_another_model(settings.run_dir(), settings)
        print(export(settings.run_dir(), arguments.format, arguments.prefix, settings.model.public_name))

    if sets:
        print(_together(chosen(asked.settings(asked.layers(weights.n_layers))), arguments))
    else:
        over_layers(asked, one, n_layers=weights.n_layers, chosen=chosen)


def _options() -> ArgumentParser:
    options = parser("evaluate.export", "Write a run, or one prefix of it, in the format of another tool.")
    options.add_argument(
        "--format",
        type=known_format,
        required=True,
        help="of weights: saelens, gemma_scope, gemma_scope_2 or circuit_tracer; of what a run does on text: delphi "
        "(on the rows of --evaluate.split and --evaluate.rows) or neuronpedia (from its evaluation)",
    )
    options.add_argument(
        "--prefix", type=int, metavar="G", help="only this prefix, counted from 0, as a narrower transcoder"
    )
    options.add_argument(
        "--partial", action="store_true", help="circuit_tracer: allow layers 0 to N of a deeper model"
    )
    options.add_argument(
        "--reads",
        choices=("normalized", "mlp_in"),
        default="normalized",
        help="circuit_tracer: inputs without the norm's gain, or with it (mlp_in), which its nnsight backend needs for "
        "Llama and Qwen models [%(default)s]",
    )
    options.add_argument(
        "--without-pages",
        action="store_true",
        help="circuit_tracer: leave out the feature pages, which quote the text",
    )
    return options


def _refuse_options(arguments: Namespace) -> None:
    own = {
        "--partial": arguments.partial,
        "--reads mlp_in": arguments.reads != "normalized",
        "--without-pages": arguments.without_pages,
    }
    if arguments.format != "circuit_tracer" and (
        given := [option for option, asked_for in own.items() if asked_for]
    ):
        raise InputError(
            f"command line: {given[0]}: is of the format circuit_tracer, found {arguments.format}; leave it out"
        )
    rows = [f"evaluate.{key}" for key in ("split", "rows") if vars(arguments)[f"evaluate.{key}"] is not None]
    if arguments.format == "neuronpedia" and rows:
        raise InputError(
            f"command line: --{rows[0]}: FORMAT=neuronpedia takes the rows of the run's evaluation; leave it out"
        )


def _together(settings: Settings, arguments: Namespace) -> Path:
    """A format that has one folder for all layers."""
    if arguments.format == "delphi":
        from evaluate.handover.delphi import export_delphi

        return export_delphi(settings, arguments.prefix)
    if arguments.format == "neuronpedia":
        from evaluate.handover.neuronpedia import export_neuronpedia

        return export_neuronpedia(settings, arguments.prefix)
    from evaluate.feature_pages import SetPages
    from transcoder.export import export_set

    pages = None if arguments.without_pages else SetPages(settings, arguments.prefix).write
    return export_set(settings, arguments.prefix, arguments.partial, arguments.reads, pages)


if __name__ == "__main__":
    run_stage(main)

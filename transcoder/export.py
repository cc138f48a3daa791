"""python -m transcoder.export --layer 17 --run name --format saelens [--prefix 0]: a run in other tools' formats.

What they all read: float32 weights on raw activations without the norm's gain (Gemma Scope 2: with it), one threshold
per latent, decoder rows of unit norm. A prefix is exported as the narrower transcoder that it is, with its own
threshold.
"""

from dataclasses import replace
from pathlib import Path

from common.cli import load, parser, run_stage
from common.errors import InputError
from common.files import whole_folder
from common.hooks import INPUT_HOOKS, Convention
from common.settings import Settings
from transcoder import weights
from transcoder.formats import WRITERS, circuit_tracer
from transcoder.gain import convert
from transcoder.public import published
from transcoder.transcoder import Transcoder

FORMATS = (*WRITERS, "circuit_tracer")


HOOKS = ("model", "input_hook", "output_hook")
NEEDED: dict[str, tuple[str, ...]] = {
    "saelens": HOOKS,
    "gemma_scope_2": HOOKS,
    "circuit_tracer": (*HOOKS, "n_layers"),
}
"""What a format says of the language model, as keys of a store's source."""
CONVENTIONS: dict[str, Convention] = {"gemma_scope_2": "mlp_in"}
"""Whose transcoders read inputs with the norm's gain; the others' read them without."""


def export(run_dir: Path, to: str, prefix: int | None = None, name: str | None = None) -> Path:
    """Write the run, or one prefix of it, to <run>/export/<to>[_prefix_g]; returns the directory to load.

    `name`: what the model is called in it, if not what `transcoder.public.published` says.
    """
    transcoder = exported(run_dir, prefix, name, CONVENTIONS.get(to, "normalized"))
    _refuse_unknown(run_dir, transcoder, to)
    folder = run_dir / "export" / (to + _suffix(prefix))
    with whole_folder(folder) as aside:
        written = WRITERS[to](aside, *transcoder.saved())
    return folder / written.relative_to(aside)


def export_set(settings: Settings, prefix: int | None = None, partial: bool = False) -> Path:
    """Write the runs of one name to <model>/export/circuit_tracer/<run>[_prefix_g], a folder for circuit-tracer.

    Of `settings.layers`, or of every layer that has such a run. `partial`: see `circuit_tracer.write`.
    """
    model = settings.paths.checkpoints / "transcoder" / settings.model_slug
    folders = [model / f"layer_{layer}" for layer in settings.layers] or sorted(model.glob("layer_*"))
    runs = [folder / settings.run for folder in folders]
    called = settings.model.public_name
    layers = []
    for run in runs:
        if (run / weights.FILE_NAME).is_file():
            weights.refuse_another_model(run, settings)
            transcoder = exported(run, prefix, called)
            _refuse_unknown(run, transcoder, "circuit_tracer")
            layers.append(transcoder.saved())
    if not layers:
        raise InputError(f"{model}: no layer of those asked for has a finished run {settings.run}")
    name = settings.run + _suffix(prefix)
    folder = model / "export" / "circuit_tracer" / name
    with whole_folder(folder) as aside:
        circuit_tracer.write(aside, layers, name, partial)
    return folder


def _refuse_unknown(run_dir: Path, transcoder: Transcoder, to: str) -> None:
    """An imported transcoder's file may not say what a format has to."""
    for key in NEEDED.get(to, ()):
        if transcoder.metadata["source"].get(key) is None:
            raise InputError(_unknown(run_dir, key))


def _unknown(run_dir: Path, key: str) -> str:
    return (
        f"{run_dir}: source.{key} is not known of this imported transcoder; import it again once its layer is "
        "harvested: the store knows"
    )


def _suffix(prefix: int | None) -> str:
    return "" if prefix is None else f"_prefix_{prefix}"


def exported(
    run_dir: Path, prefix: int | None, name: str | None = None, convention: Convention = "normalized"
) -> Transcoder:
    """The run's transcoder, or one prefix of it, as a format wants it: with or without the norm's gain, fit to be seen.

    Raises `InputError` for top-k: none of the formats has a place for it.
    """
    transcoder = Transcoder.load(run_dir)
    n = len(transcoder.prefix_ends)
    if prefix is not None and not 0 <= prefix < n:
        raise InputError(f"prefix: {run_dir} has prefixes 0 to {n - 1}, found {prefix}")
    source = transcoder.metadata.get("source", {})
    if type(source.get("layer")) is not int:  # it becomes part of a path
        raise InputError(f"{run_dir}: source.layer: expected a number, found {source.get('layer')!r:.80}")
    if transcoder.k is not None:
        raise InputError(
            f"{run_dir}: keeps the {transcoder.k} largest activations of each row, which no format has a place for: "
            "they have a threshold for each latent; make push publishes it as it is"
        )
    positive = transcoder.thresholds.clamp_min(0)  # the same: an activation is positive
    gated = replace(transcoder, thresholds=positive, metadata=published(transcoder.metadata, name))
    if source.get("input") in INPUT_HOOKS.keys() - {convention} and not isinstance(source.get("gain"), list):
        raise InputError(_unknown(run_dir, "gain"))
    whole = convert(gated, convention, source, str(run_dir))
    return whole if prefix is None else whole.prefix(prefix)


def main() -> None:
    options = parser("transcoder.export", "Write a run, or one prefix of it, in another tool's format.")
    options.add_argument("--format", choices=FORMATS, required=True, help="whose format")
    options.add_argument("--prefix", type=int, metavar="G", help="only this prefix, as a narrower transcoder")
    options.add_argument(
        "--partial", action="store_true", help="circuit_tracer: layers 0 to N of a deeper model will do"
    )
    settings, arguments = load(options)
    settings = weights.chosen_run(settings, arguments.run, every_layer=arguments.format == "circuit_tracer")
    if arguments.format == "circuit_tracer":
        print(export_set(settings, arguments.prefix, arguments.partial))
    else:
        weights.refuse_another_model(settings.run_dir(), settings)
        print(export(settings.run_dir(), arguments.format, arguments.prefix, settings.model.public_name))


if __name__ == "__main__":
    run_stage(main)

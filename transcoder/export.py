"""A run in other tools' formats; make export is `python -m evaluate.export`.

What they all read: float32 weights on raw activations without the norm's gain, one threshold per latent, decoder
rows of unit norm. A prefix is exported as the narrower transcoder that it is, with its own threshold.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from common.cli import run_stage
from common.errors import InputError
from common.files import whole_folder
from common.settings import Settings
from transcoder import weights
from transcoder.formats import WRITERS, circuit_tracer
from transcoder.gain import convert
from transcoder.public import published
from transcoder.transcoder import Transcoder

FORMATS = (*WRITERS, "circuit_tracer")


HOOKS = ("model", "input_hook", "output_hook")
NEEDED: dict[str, tuple[str, ...]] = {"saelens": HOOKS, "circuit_tracer": (*HOOKS, "n_layers")}
"""What a format says of the language model, as keys of a store's source."""


def export(run_dir: Path, to: str, prefix: int | None = None, name: str | None = None) -> Path:
    """Write the run, or one prefix of it, to <run>/export/<to>[_prefix_g]; returns the directory to load.

    `name`: what the model is called in it, if not what `transcoder.public.published` says.
    """
    transcoder = exported(run_dir, prefix, name)
    _refuse_unknown(run_dir, transcoder, to)
    folder = run_dir / "export" / (to + _suffix(prefix))
    with whole_folder(folder) as aside:
        written = WRITERS[to](aside, *transcoder.saved())
    return folder / written.relative_to(aside)


def export_set(
    settings: Settings,
    prefix: int | None = None,
    partial: bool = False,
    add: Callable[[Path, Mapping[int, tuple[Path, int]]], None] | None = None,
) -> Path:
    """Write the runs of one name to <model>/export/circuit_tracer/<run>[_prefix_g], a folder for circuit-tracer.

    Of `settings.layers`, or of every layer that has such a run. `partial`: see `circuit_tracer.write`. `add` gets the
    folder and each layer's run directory and number of latents, and writes what else belongs in it.
    """
    model = settings.paths.checkpoints / "transcoder" / settings.model_slug
    folders = [model / f"layer_{layer}" for layer in settings.layers] or sorted(model.glob("layer_*"))
    runs = [folder / settings.run for folder in folders]
    called = settings.model.public_name
    layers, sources = [], {}
    for run in runs:
        if (run / weights.FILE_NAME).is_file():
            weights.refuse_another_model(run, settings)
            transcoder = exported(run, prefix, called)
            _refuse_unknown(run, transcoder, "circuit_tracer")
            layers.append(transcoder.saved())
            sources[transcoder.metadata["source"]["layer"]] = run, transcoder.d_sae
    if not layers:
        raise InputError(f"{model}: no layer of those asked for has a finished run {settings.run}")
    name = settings.run + _suffix(prefix)
    folder = model / "export" / "circuit_tracer" / name
    with whole_folder(folder) as aside:
        circuit_tracer.write(aside, layers, partial)
        if add is not None:
            add(aside, sources)
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


def exported(run_dir: Path, prefix: int | None, name: str | None = None) -> Transcoder:
    """The run's transcoder, or one prefix of it, as every format wants it: without the norm's gain, fit to be seen."""
    transcoder = Transcoder.load(run_dir)
    n = len(transcoder.prefix_ends)
    if prefix is not None and not 0 <= prefix < n:
        raise InputError(f"prefix: {run_dir} has prefixes 0 to {n - 1}, found {prefix}")
    source = transcoder.metadata.get("source", {})
    if type(source.get("layer")) is not int:  # it becomes part of a path
        raise InputError(f"{run_dir}: source.layer: expected a number, found {source.get('layer')!r:.80}")
    positive = transcoder.thresholds.clamp_min(0)  # the same: an activation is positive
    gated = replace(transcoder, thresholds=positive, metadata=published(transcoder.metadata, name))
    if source.get("input") == "mlp_in" and not isinstance(source.get("gain"), list):
        raise InputError(_unknown(run_dir, "gain"))
    whole = convert(gated, "normalized", source, str(run_dir))
    return whole if prefix is None else whole.prefix(prefix)


def main() -> None:
    raise InputError("python -m transcoder.export: is now python -m evaluate.export, with the same options")


if __name__ == "__main__":
    run_stage(main)

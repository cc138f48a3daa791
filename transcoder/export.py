"""A run in other tools' formats; make export is `python -m evaluate.export`.

What they all read: float32 weights on raw activations without the norm's gain (Gemma Scope 2: with it), one threshold
per latent, decoder rows of unit norm. A prefix is exported as the narrower transcoder that it is, with its own
threshold.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.cli import run_stage
from common.errors import InputError
from common.files import locked, whole_folder
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
    _refuse_unknown(run_dir, transcoder.metadata["source"], to)
    folder = run_dir / "export" / (to + suffix(prefix))
    with export_folder(folder) as aside:
        written = WRITERS[to](aside, *transcoder.saved())
    return folder / written.relative_to(aside)


@contextmanager
def export_folder(folder: Path) -> Iterator[Path]:
    """An empty directory that takes the place of `folder` when it is whole; of one export at a time."""
    lock = folder.with_name(f".{folder.name}.lock")
    with locked(lock, f"{folder}: another make export is writing it"), whole_folder(folder) as aside:
        yield aside


def export_set(
    settings: Settings,
    prefix: int | None = None,
    partial: bool = False,
    reads: Convention = "normalized",
    add: Callable[[Path, Mapping[int, Path]], None] | None = None,
) -> Path:
    """Write the runs of one name to <model>/export/circuit_tracer/<run>[_prefix_g], a folder for circuit-tracer.

    Parameters as of `write_set`.
    """
    model = settings.paths.checkpoints / "transcoder" / settings.model_slug
    name = settings.run + suffix(prefix) + ("" if reads == "normalized" else f"_{reads}")
    folder = model / "export" / "circuit_tracer" / name
    with export_folder(folder) as aside:
        write_set(aside, settings, prefix, partial, reads, add)
    return folder


def write_set(
    folder: Path,
    settings: Settings,
    prefix: int | None = None,
    partial: bool = False,
    reads: Convention = "normalized",
    add: Callable[[Path, Mapping[int, Path]], None] | None = None,
) -> None:
    """Write circuit-tracer's set into `folder`, a layer at a time.

    Of `settings.layers`, or of every layer that has such a run. `partial`: see `circuit_tracer.write`. `reads`: inputs
    with the norm's gain or without. `add` gets the folder and each layer's run directory, and writes what else belongs
    in it.
    """
    model = settings.paths.checkpoints / "transcoder" / settings.model_slug
    layers = settings.layers or weights.layers_of(settings)
    there = (model / f"layer_{layer}" / settings.run for layer in layers)
    runs = [run for run in there if (run / weights.FILE_NAME).is_file()]
    if not runs:
        raise InputError(f"{model}: no layer of those asked for has a finished run {settings.run}")
    sources = {}
    for run in runs:
        weights.refuse_another_model(run, settings)
        metadata = weights.read_metadata(run)
        _refuse_top_k(run, metadata.get("k"))
        source = metadata.get("source", {})
        _refuse_unknown_gain(run, source, reads)
        _refuse_unknown(run, source, "circuit_tracer")
        sources[_layer(run, source)] = run, source
    circuit_tracer.check_layers(sources, next(iter(sources.values()))[1]["n_layers"], partial)
    saved = (exported(run, prefix, settings.model.public_name, reads).saved() for run, _ in sources.values())
    circuit_tracer.write(folder, saved, partial)
    if add is not None:
        add(folder, {layer: run for layer, (run, _) in sources.items()})


def _refuse_unknown(run_dir: Path, source: Mapping[str, Any], to: str) -> None:
    """An imported transcoder's file may not say what a format has to."""
    for key in NEEDED.get(to, ()):
        if source.get(key) is None:
            raise InputError(_unknown(run_dir, key))


def _refuse_top_k(run_dir: Path, k: int | None) -> None:
    if k is not None:
        raise InputError(
            f"{run_dir}: keeps the {k} largest activations of each row, which no format has a place for: "
            "they have a threshold for each latent; make push publishes it as it is"
        )


def _refuse_unknown_gain(run_dir: Path, source: Mapping[str, Any], reads: Convention) -> None:
    if source.get("input") in INPUT_HOOKS.keys() - {reads} and not isinstance(source.get("gain"), list):
        raise InputError(_unknown(run_dir, "gain"))


def _unknown(run_dir: Path, key: str) -> str:
    return (
        f"{run_dir}: source.{key} is not known of this imported transcoder; import it again once its layer is "
        "harvested: the store knows"
    )


def suffix(prefix: int | None) -> str:
    """What a folder's name says of the prefix in it."""
    return "" if prefix is None else f"_prefix_{prefix}"


def exported(
    run_dir: Path, prefix: int | None, name: str | None = None, reads: Convention = "normalized"
) -> Transcoder:
    """The run's transcoder, or one prefix of it, as formats want it: fit to be seen, on inputs without the norm's gain
    (`reads`: with it).

    Raises `InputError` where a gain is not known, or of zero (see `transcoder.gain.convert`), and for top-k, which no
    format has a place for.
    """
    transcoder = Transcoder.load(run_dir)
    refuse_prefix(run_dir, len(transcoder.prefix_ends), prefix)
    source = transcoder.metadata.get("source", {})
    _layer(run_dir, source)
    _refuse_top_k(run_dir, transcoder.k)
    positive = transcoder.thresholds.clamp_min(0)  # the same: an activation is positive
    gated = replace(transcoder, thresholds=positive, metadata=published(transcoder.metadata, name))
    _refuse_unknown_gain(run_dir, source, reads)
    whole = convert(gated, reads, source, str(run_dir))
    return whole if prefix is None else whole.prefix(prefix)


def refuse_prefix(run_dir: Path, n: int, prefix: int | None) -> None:
    """Raise `InputError` where a run of `n` prefixes has not the one that was asked for."""
    if prefix is not None and not 0 <= prefix < n:
        raise InputError(f"prefix: {run_dir} has prefixes 0 to {n - 1}, found {prefix}")


def _layer(run_dir: Path, source: Mapping[str, Any]) -> int:
    """The layer that a file's metadata say; it becomes part of a path."""
    layer = source.get("layer")
    if type(layer) is not int:
        raise InputError(f"{run_dir}: source.layer: expected a number, found {layer!r:.80}")
    return layer


def main() -> None:
    raise InputError("python -m transcoder.export: is now python -m evaluate.export, with the same options")


if __name__ == "__main__":
    run_stage(main)

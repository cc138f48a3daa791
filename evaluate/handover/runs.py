"""Which runs are handed over, and where to: one layer into its run's directory, several into one folder."""

from pathlib import Path

from common.errors import InputError
from common.settings import Settings
from transcoder import weights
from transcoder.export import refuse_prefix, suffix


def runs_of(settings: Settings, prefix: int | None) -> dict[int, Path]:
    """Each layer's run directory: of the layers asked for, or of all that have a finished run of this name.

    Raises `InputError` where there is none, or not this prefix.
    """
    layers = settings.layers or weights.layers_of(settings)
    runs = {layer: settings.of_layer(layer).run_dir() for layer in layers}
    if not runs:
        model = settings.paths.checkpoints / "transcoder" / settings.model_slug
        raise InputError(f"{model}: no layer has a finished run {settings.run}")
    for run in runs.values():
        weights.refuse_another_model(run, settings)
        refuse_prefix(run, len(weights.read_metadata(run)["prefix_ends"]), prefix)
    return runs


def folder_of(settings: Settings, runs: dict[int, Path], to: str, prefix: int | None, more: str = "") -> Path:
    """Where an export of these runs is written."""
    end = suffix(prefix) + more
    if len(runs) == 1:
        return next(iter(runs.values())) / "export" / (to + end)
    model = settings.paths.checkpoints / "transcoder" / settings.model_slug
    return model / "export" / to / (settings.run + end)

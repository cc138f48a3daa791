"""A run's newest checkpoint as a transcoder of its own, beside the run: <run>/at_step_N/transcoder.safetensors."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from common.errors import InputError, shown
from common.settings import Settings
from shards import Store
from train import checkpoint, record
from train.finish import calibrated, calibration_inputs, raw_transcoder
from train.recipe import Recipe, initialise
from train.state import State
from transcoder import weights
from transcoder.selection import SELECT
from transcoder.transcoder import Transcoder


def folder_of(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step is written as a transcoder."""
    return run_dir / f"at_step_{step}"


@torch.no_grad()
def snapshot(run_dir: Path, store: Store, device: torch.device) -> Path:
    """Write the newest checkpoint as a transcoder, thresholds calibrated as after a last step; returns its directory.

    Nothing to do where that was done. A training that goes on meanwhile is left alone. Raises `InputError` where there
    is no checkpoint, or the run was trained on another store.
    """
    settings, fingerprint, _, used = record.read(run_dir)
    if fingerprint != store.manifest.fingerprint:
        raise InputError(
            f"{run_dir}: trained on harvest {shown(fingerprint)}, {store.path} is {shown(store.manifest.fingerprint)}; "
            "a checkpoint is evaluated on the store that it was trained on (HARVEST=name)"
        )
    newest = record.latest(run_dir)
    if newest is not None and _is_written(folder := folder_of(run_dir, record.step_of(newest))):
        return folder
    recipe = Recipe.of(settings, store, device)
    state = _restored(run_dir, settings, recipe, store, device)
    folder = folder_of(run_dir, state.step)
    if _is_written(folder):  # a training that goes on has written the next checkpoint
        return folder
    raw = raw_transcoder(state, recipe, recipe.objective.prefix_ends)
    if state.kept_rows and state.step > recipe.counting_from:
        kept = (state.kept / state.kept_rows).tolist()
    else:  # training counts them over its last tenth
        kept = kept_per_row(raw, calibration_inputs(store, recipe, device), recipe)
    more = {"checkpoint": {"step": state.step, "of": recipe.steps}, "used": recipe.used() | used}
    calibrated(settings, store, recipe, state, kept, more=more).save(folder)
    return folder


def _is_written(folder: Path) -> bool:
    return (folder / weights.FILE_NAME).exists()


def kept_per_row(raw: Transcoder, batches: Iterable[Tensor], recipe: Recipe) -> list[float]:
    """Active latents per row below each prefix end that training's own selection keeps on these batches."""
    objective = recipe.objective
    counts, rows = torch.zeros(objective.d_sae, dtype=torch.float64), 0
    for inputs in batches:
        entries, _ = SELECT[objective.selection](raw.pre_activations(inputs), objective.k)
        counts += torch.bincount(entries.latents, minlength=objective.d_sae).cpu()
        rows += len(inputs)
    ends = torch.tensor(objective.prefix_ends)
    return (counts.cumsum(0)[ends - 1] / rows).tolist()


def _restored(run_dir: Path, settings: Settings, recipe: Recipe, store: Store, device: torch.device) -> State:
    """The state of the newest checkpoint; a training that writes the next one takes the last one away: read that."""
    source, objective, skip = store.manifest.source, recipe.objective, settings.transcoder.skip
    zeros = torch.zeros(source.d_out, dtype=torch.float64)
    fresh = initialise(source.d_in, objective.d_sae, zeros, skip=skip, seed=0)
    sampled = settings.train.sample_every > 0
    state = State.start(fresh.map(lambda each: each.to(device)), objective.prefix_ends, sampled)
    while True:
        before = record.latest(run_dir)
        try:
            if checkpoint.restore(run_dir, state, slice(0, objective.d_sae), objective.d_sae):
                return state
        except InputError:
            if record.latest(run_dir) == before:
                raise
            continue
        raise InputError(
            f"{run_dir}: has no checkpoint yet; the first comes after train.checkpoint_every steps"
        )

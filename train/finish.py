"""After the last step: thresholds from train rows, numbers from held-out rows, the weights' file."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.numbers import marked_fvu, number_or_dash
from common.processes import ALONE, Processes
from common.settings import Settings
from common.terminal.table import Table
from shards import Store
from train import activation_samples, record
from train.measure import CALIBRATION_ROWS, MEASURED_ROWS, calibrate, measure
from train.normalisation import fold
from train.plan import memory
from train.recipe import Recipe
from train.state import State
from transcoder import weights
from transcoder.frequent import FREQUENT_GOOD, FREQUENT_MODERATE, frequent_level
from transcoder.public import public_name
from transcoder.transcoder import OF_LATENTS, Transcoder


def raw_transcoder(state: State, recipe: Recipe, prefix_ends: tuple[int, ...]) -> Transcoder:
    """The present state as a transcoder of raw activations, its thresholds still zero.

    `prefix_ends`: counted within the latents that the state holds.
    """
    folded = fold(state.parameters, recipe.scaling)
    return Transcoder(folded, torch.zeros(len(prefix_ends), device=folded.b_dec.device), prefix_ends)


@torch.no_grad()
def finish(
    settings: Settings, store: Store, recipe: Recipe, state: State, latents: slice, holders: Processes = ALONE
) -> None:
    """Calibrate, measure on held-out rows, write the samples and, last, transcoder.safetensors.

    `holders`: the processes that see the same rows and each hold a slice of the latents. All of them call it;
    `latents`: this process's slice.
    """
    run_dir, ends, scale = settings.run_dir(), recipe.objective.prefix_ends, recipe.scaling.scale_out
    kept_per_row = (state.kept / state.kept_rows).tolist()
    transcoder = calibrated(settings, store, recipe, state, kept_per_row, latents, holders)
    if state.samples is not None:
        samples = state.samples.of_all(holders)
        if holders.leads:
            activation_samples.write(run_dir, samples, store, ends, scale)
    _save(run_dir, replace(transcoder, prefix_ends=ends), latents, holders)


def _save(run_dir: Path, transcoder: Transcoder, latents: slice, holders: Processes) -> None:
    """Write transcoder.safetensors; each holder writes its own latents, which `transcoder` has."""
    tensors, metadata = transcoder.saved()
    d_sae = transcoder.prefix_ends[-1]
    shapes = {
        name: (d_sae, *tensor.shape[1:]) if name in OF_LATENTS else tuple(tensor.shape)
        for name, tensor in tensors.items()
    }

    def put_own() -> None:
        for name, tensor in tensors.items():
            if name in OF_LATENTS or holders.leads:
                start = latents.start if name in OF_LATENTS else 0
                # what the first has written is flushed by `commit`
                weights.put(run_dir, name, start, tensor, flushed=not holders.leads)

    try:
        if holders.leads:
            weights.begin(run_dir, shapes, metadata)
        holders.wait()  # until the files are there
        holders.together(put_own)
        if holders.leads:
            weights.commit(run_dir)
    except BaseException:
        if holders.leads:
            weights.drop(run_dir)
        raise


def calibrated(
    settings: Settings,
    store: Store,
    recipe: Recipe,
    state: State,
    kept_per_row: list[float],
    latents: slice | None = None,
    holders: Processes = ALONE,
    more: dict[str, Any] | None = None,
) -> Transcoder:
    """The present state as it is saved: thresholds from train rows, numbers from held-out rows. `more`: more metadata.

    With several `holders`, the transcoder has only these `latents`; its thresholds and metadata are the whole one's.
    """
    own = recipe.objective.of(latents or slice(0, recipe.objective.d_sae))
    raw = raw_transcoder(state, recipe, own.prefix_ends)
    device = raw.W_enc.device
    thresholds = calibrate(raw, lambda: calibration_inputs(store, recipe, device), kept_per_row, holders)
    rows = heldout_rows(store, MEASURED_ROWS, device)
    heldout = measure(raw, rows, lambda _: thresholds, recipe.typical, holders)
    metadata = {
        "settings": record.trained_with(settings, store.manifest.source),
        "harvest_fingerprint": store.manifest.fingerprint,
        "source": store.manifest.source.model_dump(mode="json"),
        "public_name": settings.model.public_name or public_name(store.manifest.source.model),
        "used": recipe.used(),
        "training": {"rows": state.rows, "steps": state.step, "l0": kept_per_row},
        "heldout": heldout._asdict(),
        "thresholds": thresholds.tolist(),
        "versions": record.versions(),
        "git_commit": record.git_commit(),
    }
    return Transcoder(raw.parameters, thresholds, raw.prefix_ends, metadata | (more or {}))


def calibration_inputs(store: Store, recipe: Recipe, device: torch.device) -> Iterator[Tensor]:
    """Shuffled train inputs, CALIBRATION_ROWS of them or all there are."""
    train, rows = recipe.train, 0
    with closing(store.train.loader(train.batch_size, train.order_seed, device=device).batches()) as batches:
        for batch in batches:
            yield batch.inputs[: CALIBRATION_ROWS - rows]
            rows += len(batch.inputs)
            if rows >= CALIBRATION_ROWS:
                return


def heldout_rows(
    store: Store, limit: int, device: torch.device, block: int = 1024
) -> Iterator[tuple[Tensor, Tensor]]:
    """The first `limit` held-out rows, or all there are, as blocks of (inputs, outputs)."""
    n = min(limit, len(store.heldout))
    for start in range(0, n, block):
        inputs, outputs = store.heldout.rows(start, min(start + block, n))
        yield inputs.to(device), outputs.to(device)


def summary(metadata: dict[str, Any], peak: int | None = None) -> Table:
    """The held-out numbers of every prefix, as a table; below it `peak`, the most bytes that training has taken."""
    heldout, ends = metadata["heldout"], metadata["prefix_ends"]
    title = "the store has no held-out rows: nothing was measured"
    if heldout["rows"]:
        dead = 100 * heldout["dead"] / ends[-1]
        title = f"{heldout['rows']:,} held-out rows; {dead:.1f} % of the latents never fire"
    columns = ("prefix", "latents", "FVU", "L0", "L0 train", "threshold", "dead %", ">10 %")
    lines = [_caption(heldout), f"peak memory {peak / memory.GIB:.1f} GiB" if peak else None]
    table = Table(*columns, title=title, caption="\n".join(filter(None, lines)))
    for g, end in enumerate(ends):
        table.add_row(
            str(g),
            f"{end:,}",
            number_or_dash(heldout["fvu"][g], ".4f"),
            f"{heldout['l0'][g]:.2f}" if heldout["rows"] else "-",
            f"{metadata['training']['l0'][g]:.2f}",
            f"{metadata['thresholds'][g]:.4g}",
            *_shares(heldout, g),
        )
    return table


def line_of(metadata: dict[str, Any]) -> dict[str, str]:
    """The same in a line, for a table of several runs."""
    heldout = metadata["heldout"]
    typical = heldout["fvu_typical"] if heldout.get("heavy_rows") else [None] * len(heldout["fvu"])
    both = zip(heldout["fvu"], typical, strict=True)
    return {
        "FVU of each prefix": " ".join(marked_fvu(*each, ".4f") for each in both),
        "L0": f"{heldout['l0'][-1]:.1f}",
        "never fire": f"{100 * heldout['dead'] / metadata['prefix_ends'][-1]:.1f} %",
    }


def _shares(heldout: dict[str, Any], g: int) -> tuple[str, str]:
    """Percentages of prefix g's latents that never fire and that are frequent; older headers have neither."""
    if not heldout["rows"] or "dead_fraction" not in heldout:
        return "-", "-"
    return f"{100 * heldout['dead_fraction'][g]:.1f}", f"{100 * heldout['over_10_percent_fraction'][g]:.1f}"


def _caption(heldout: dict[str, Any]) -> str | None:
    """The verdict on each prefix's frequent latents, and the FVU without heavy rows; older headers have neither."""
    if not heldout["rows"] or "over_10_percent_fraction" not in heldout:
        return None
    levels = ", ".join(frequent_level(share) for share in heldout["over_10_percent_fraction"])
    limits = f"up to {100 * FREQUENT_GOOD:g} % is good, up to {100 * FREQUENT_MODERATE:g} % moderate"
    lines = [f">10 %: latents that fire on more than 10 % of the rows: {levels} ({limits})"]
    if heavy := heldout.get("heavy_rows"):
        without = " ".join(number_or_dash(fvu, ".4f") for fvu in heldout["fvu_typical"])
        lines.append(f"FVU without {heavy:,} heavy row{'s' * (heavy > 1)}: {without}")
    return "\n".join(lines)

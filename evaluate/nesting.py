"""What nesting costs: the evaluation of a sibling run that differs in having one group only."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from common.errors import InputError
from common.files import sha256
from common.settings import Settings, validated
from evaluate.files import finished
from evaluate.records import Metrics, OneGroupMetrics, Provenance
from shards import Store
from train.record import identity
from transcoder.weights import FILE_NAME, read_metadata

Identity = Mapping[str, Any]
"""What decides a run's weights, by setting: see `train.record.identity`."""
MAY_DIFFER = {"transcoder.group_sizes"}
"""What a run without nesting need not have in common with the one that it is a baseline for."""


def one_group(settings: Settings, store: Store, rows: int) -> OneGroupMetrics | None:
    """The numbers of a run without nesting beside the run that `settings` name; none where there is none.

    It was trained on this store with the same settings, and its weights as they are now were evaluated on the same
    `rows` rows. A sibling whose metrics.json cannot be read is told on standard error, and is none.
    """
    run_dir = settings.run_dir()
    own = _trained_with(run_dir, store)
    if own is None or len(own["transcoder.group_sizes"]) == 1:
        return None
    wanted = (store.manifest.fingerprint, settings.evaluate.split, rows)
    runs = run_dir.parent
    for folder in sorted([*runs.glob("*/evaluation"), *runs.glob("*/evaluations/*")]):
        sibling = runs / folder.relative_to(runs).parts[0]
        other = _trained_with(sibling, store)
        if other is None or len(other["transcoder.group_sizes"]) != 1 or _differ(own, other):
            continue
        metrics = _metrics(folder)
        if metrics is not None and _is_of(metrics.provenance, wanted, sibling / FILE_NAME):
            numbers = {
                key: value for key, value in metrics.prefixes[0] if isinstance(value, int | float | None)
            }
            of = {"run": sibling.name, "weights_sha256": metrics.provenance.weights_sha256}
            return OneGroupMetrics.model_validate(numbers | of)
    return None


def _trained_with(run_dir: Path, store: Store) -> Identity | None:
    """What decides the weights of a run that was trained on this store; none for any other transcoder."""
    try:
        metadata = read_metadata(run_dir)
        if not metadata.get("settings") or metadata.get("harvest_fingerprint") != store.manifest.fingerprint:
            return None
        return identity(validated(metadata["settings"], str(run_dir)), store.manifest.source.d_in)
    except ValueError:  # of another version, or damaged: it was looked at, not asked for
        return None


def _differ(own: Identity, other: Identity) -> bool:
    return any(own[key] != other[key] for key in own.keys() - MAY_DIFFER)


def _metrics(folder: Path) -> Metrics | None:
    try:
        return finished(folder)
    except InputError as error:
        tqdm.write(f"not a baseline: {error}", file=sys.stderr)
        return None


def _is_of(of: Provenance, wanted: tuple[str, str, int], weights: Path) -> bool:
    """`wanted`: store, split and rows."""
    return (of.store_fingerprint, of.split, of.rows) == wanted and of.weights_sha256 == sha256(weights)

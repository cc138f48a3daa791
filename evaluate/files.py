"""metrics.json and the folder it stands in: read with one-line errors, written whole or not at all."""

import json
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open

from common.errors import InputError, first_line
from common.files import write_whole
from evaluate.records import BaselineMetrics, Metrics, Provenance, Record, Results
from train.log import LogLine, log_lines

METRICS_VERSION = 2
"""Raised by hand with every change of what is measured or how the page shows it: an evaluation of another version is
done again. (A digest of the source did that before; a comment in the style sheet measured everything again.)"""


LATENTS, CONTEXTS = "latents.safetensors", "contexts.safetensors"
"""What is known of each latent, and the rows that are shown of it: beside metrics.json."""


class _Asked(BaseModel):
    """What an evaluation of any version answers, as far as it says so."""

    split: str | None = None
    rows: int | None = None
    cross_entropy_tokens: int = 0
    store_fingerprint: str = ""


class _Language(BaseModel):
    skipped: str | None = ""


class _Done(BaseModel):
    """What is read of an evaluation of any version."""

    provenance: _Asked | None = None
    cross_entropy: _Language | None = None
    files: list[str] = []


def read_json(path: Path, remedy: str) -> dict[str, object]:
    """The JSON object in `path`; `InputError` naming the file and the `remedy` if it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: not found; {remedy}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error}); {remedy}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}; {remedy}")
    return value


def read_lines(path: Path) -> list[LogLine]:
    """The values of every line of a run's metrics.jsonl; none if there is no file."""
    return [values for _, values in log_lines(path)]


def write_record(path: Path, record: Record) -> None:
    """Written whole: a reader sees the old file or the new one."""
    write_whole(path, (json.dumps(record.written(), indent=1, allow_nan=False) + "\n").encode())


def complete(folder: Path) -> dict[str, object] | None:
    """The JSON of a complete evaluation of any version: metrics.json is written last and names the other files."""
    path, remedy = folder / "metrics.json", f"remove {folder} to evaluate again"
    values = read_json(path, remedy) if path.exists() else None
    if values is None:
        return None
    try:
        evaluation = _Done.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{path}: {_first(error)}; {remedy}") from error
    there = all((folder / name).exists() for name in evaluation.files)
    return values if there and evaluation.provenance is not None else None


def damaged(folder: Path, values: Mapping[str, object]) -> list[str]:
    """Files of a complete evaluation that are cut short, as a copy is that was interrupted or a disk that was full."""
    return [name for name in _Done.model_validate(values).files if not _whole(folder / name)]


def _whole(file: Path) -> bool:
    """Whether a file ends as its kind does: safetensors compares its length with its header."""
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "numpy"):
                return True
        except (OSError, SafetensorError):
            return False
    ending = {".png": b"IEND\xaeB`\x82", ".html": b"</html>"}.get(file.suffix, b"")
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - len(ending) - 2))
        return ending in opened.read()


def finished(folder: Path) -> Metrics | None:
    """The metrics of a complete evaluation; `InputError` where another version wrote them, with other fields."""
    values = complete(folder)
    if values is None:
        return None
    try:
        return Metrics.model_validate(values)
    except ValidationError as error:
        raise InputError(
            f"{folder / 'metrics.json'}: {_first(error)}: it is of another version; evaluate again (make evaluate)"
        ) from error


def _first(error: ValidationError) -> str:
    """The first field that is wrong, in words."""
    first = error.errors()[0]
    field = f"field {'.'.join(map(str, first['loc']))}: " if first["loc"] else ""
    return f"{field}{first['msg'][0].lower()}{first['msg'][1:]}"


def is_of(folder: Path, weights_sha256: str) -> bool:
    """Whether there is a complete evaluation, of any version, of the weights with this digest."""
    provenance = (complete(folder) or {}).get("provenance")
    known = isinstance(provenance, dict) and provenance.get("weights_sha256") == weights_sha256
    return known and (folder / LATENTS).is_file()


def latents_of(folder: Path, *names: str) -> list[np.ndarray]:
    """Columns of an evaluation's latents.safetensors; raises `InputError` where that is damaged."""
    try:
        with safe_open(folder / LATENTS, "numpy") as file:
            return [file.get_tensor(name) for name in names]
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{folder / LATENTS}: damaged ({first_line(error)}); remove {folder} and evaluate again (make evaluate)"
        ) from error


def kept_place(folder: Path, values: Mapping[str, object]) -> Path:
    """Where a complete evaluation goes when `folder` is needed for one of other rows: named after what was asked."""
    evaluation = _Done.model_validate(values)
    provenance = evaluation.provenance or _Asked()
    measured = evaluation.cross_entropy is not None and evaluation.cross_entropy.skipped is None
    tokens = provenance.cross_entropy_tokens if measured else 0
    return folder.with_name("evaluations") / (
        f"{provenance.split}-{provenance.rows}_rows-{tokens}_tokens-{provenance.store_fingerprint[:8]}"
    )


class Evaluation(NamedTuple):
    """A complete evaluation, and where it is."""

    folder: Path
    metrics: Metrics


def find(folder: Path, provenance: Provenance) -> Evaluation | None:
    """The complete evaluation of just this provenance: in `folder`, or one that is kept; none where there is none.

    One that lacks a field of this version is none, and one with a damaged file, which is told: it is measured again.
    """
    for each in (folder, *sorted(folder.with_name("evaluations").glob("*/"))):
        values = complete(each)
        if values is None or values["provenance"] != provenance.written():
            continue
        if cut := damaged(each, values):
            print(f"{each / cut[0]}: damaged, not whole: the run is measured again", file=sys.stderr)
            continue
        with suppress(ValidationError):
            return Evaluation(each, Metrics.model_validate(values))
    return None


def baselines_before(runs: Path, provenance: Provenance) -> BaselineMetrics | None:
    """The mean and the linear map as any run below `runs` was measured beside them, on the same rows of this store."""
    wanted = (provenance.store_fingerprint, provenance.split, provenance.rows)
    for folder in sorted([*runs.glob("*/evaluation"), *runs.glob("*/evaluations/*")]):
        with suppress(InputError):  # of another version, or damaged: it was looked at, not asked for
            metrics = finished(folder)
            of = metrics and metrics.provenance
            if (
                metrics
                and of
                and (of.store_fingerprint, of.split, of.rows) == wanted
                and metrics.baselines.linear
            ):
                return metrics.baselines
    return None


def make_room(folder: Path, results: Results | None = None) -> None:
    """Keep the evaluation in `folder` if it is none that `results` (none: any) are the answer to the same question as.

    The caller holds the run's lock. What was kept of the same question before gives way.
    """
    evaluation = complete(folder)
    if evaluation is None or (
        results is not None and kept_place(folder, evaluation) == kept_place(folder, results.written())
    ):
        return
    kept = kept_place(folder, evaluation)
    shutil.rmtree(kept, ignore_errors=True)
    kept.parent.mkdir(exist_ok=True)
    folder.replace(kept)
    print(f"the evaluation that was in {folder} is kept in {kept}", file=sys.stderr)


def bring_back(kept: Path, folder: Path) -> None:
    """Put a kept evaluation where the present one stands, which is kept in its turn."""
    make_room(folder)
    if folder.exists():
        shutil.rmtree(folder)  # what a killed evaluation has left
    kept.replace(folder)

"""metrics.json and the folder it stands in: read with one-line errors, written whole or not at all."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open

from common.errors import InputError, first_line
from common.files import write_whole
from evaluate.records import Metrics, Record
from train.log import LogLine, log_lines

METRICS_VERSION = 3
"""Raised by hand with every change of what is measured or how the page shows it: an evaluation of another version is
done again. (A digest of the source did that before; a comment in the style sheet measured everything again.)"""


LATENTS, CONTEXTS = "latents.safetensors", "contexts.safetensors"
"""What is known of each latent, and the rows that are shown of it: beside metrics.json."""


class Asked(BaseModel):
    """What an evaluation of any version answers, as far as it says so."""

    split: str | None = None
    rows: int = 0
    cross_entropy_tokens: int = 0
    store_fingerprint: str = ""
    weights_sha256: str = ""
    metrics_version: int = 0


class _Language(BaseModel):
    skipped: str | None = ""


class Done(BaseModel):
    """What is read of an evaluation of any version."""

    provenance: Asked | None = None
    cross_entropy: _Language | None = None
    files: list[str] = []

    @property
    def tokens(self) -> int:
        """Tokens that were requested for the cross-entropy, where it was measured; otherwise 0."""
        measured = self.cross_entropy is not None and self.cross_entropy.skipped is None
        return self.provenance.cross_entropy_tokens if measured and self.provenance else 0


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
        evaluation = Done.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{path}: {_first(error)}; {remedy}") from error
    there = all((folder / name).exists() for name in evaluation.files)
    return values if there and evaluation.provenance is not None else None


def damaged(folder: Path, values: Mapping[str, object]) -> list[str]:
    """Files of a complete evaluation that are truncated, for example by an interrupted copy or a full disk."""
    return [name for name in Done.model_validate(values).files if not _whole(folder / name)]


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
    """Whether there is a complete evaluation, of this version, of the weights with this digest."""
    provenance = (complete(folder) or {}).get("provenance")
    if not isinstance(provenance, dict) or provenance.get("weights_sha256") != weights_sha256:
        return False
    return provenance.get("metrics_version") == METRICS_VERSION and (folder / LATENTS).is_file()


def latents_of(folder: Path, *names: str) -> list[np.ndarray]:
    """Columns of an evaluation's latents.safetensors; raises `InputError` where that is damaged."""
    try:
        with safe_open(folder / LATENTS, "numpy") as file:
            return [file.get_tensor(name) for name in names]
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{folder / LATENTS}: damaged ({first_line(error)}); remove {folder} and evaluate again (make evaluate)"
        ) from error

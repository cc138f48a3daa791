"""JSON of an evaluation: read with one-line errors, written whole or not at all."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.files import write_whole

METRICS_VERSION = 1
"""Raised by hand with every change of what is measured or how the page shows it: an evaluation of another version is
done again. (A digest of the source did that before; a comment in the style sheet measured everything again.)"""


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in `path`; `InputError` naming the file and the `remedy` if it is not one."""
    try:
        made = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: not found; {remedy}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); {remedy}") from error
    if not isinstance(made, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(made).__name__}; {remedy}")
    return made


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; none if there is no file. A last line that a kill cut short is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    made = []
    for number, line in enumerate(lines, 1):
        try:
            made.append(json.loads(line))
        except ValueError as error:
            if line.endswith("\n"):
                raise InputError(f"{path}: line {number} is damaged ({error}); remove that line") from error
    return made


def write_json(path: Path, values: Any) -> None:
    """Written whole: a reader sees the old file or the new one."""
    write_whole(path, (json.dumps(values, indent=1, allow_nan=False) + "\n").encode())


def finished(folder: Path) -> dict[str, Any] | None:
    """The metrics of a complete evaluation: metrics.json is written last and names the other files."""
    path = folder / "metrics.json"
    metrics = read_json(path, f"remove {folder} to evaluate again") if path.exists() else None
    if metrics is None or not all((folder / name).exists() for name in metrics.get("files", [path.name])):
        return None
    return metrics if "provenance" in metrics else None


def kept_place(folder: Path, metrics: dict[str, Any]) -> Path:
    """Where a complete evaluation goes when `folder` is needed for one of other rows: named after what was asked."""
    asked, language = metrics["provenance"], metrics.get("cross_entropy") or {}
    tokens = asked.get("cross_entropy_tokens", 0) if language.get("skipped", "") is None else 0
    words = f"{asked.get('split')}-{asked.get('rows')}_rows-{tokens}_tokens-{asked.get('store_fingerprint', '')[:8]}"
    return folder.with_name("evaluations") / words


def find(folder: Path, provenance: dict[str, Any]) -> Path | None:
    """The complete evaluation of just this provenance: `folder`, or one that is kept; none where there is none."""
    for each in (folder, *sorted(folder.with_name("evaluations").glob("*/"))):
        done = finished(each)
        if done is not None and done["provenance"] == provenance:
            return each
    return None


def make_room(folder: Path, metrics: dict[str, Any] | None = None) -> None:
    """Keep the evaluation in `folder` if it is none that `metrics` (none: any) are the answer to the same question as.

    The caller holds the run's lock. What was kept of the same question before gives way.
    """
    done = finished(folder)
    if done is None or (metrics is not None and kept_place(folder, done) == kept_place(folder, metrics)):
        return
    kept = kept_place(folder, done)
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

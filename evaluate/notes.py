"""A person's labels and stars for a run's latents: notes.csv or notes.json in the run directory. Imports no torch.

Columns (or keys of each object of a JSON array): layer, latent, label; score and source may be left out. The report
page saves such a file; labels that another program made are read the same way.
"""

import csv
import io
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from common.errors import InputError, first_line, shown
from evaluate.records import Record

COLUMNS = ("layer", "latent", "label", "score", "source")
NEEDED = COLUMNS[:3]
NAMES = re.compile(r"(notes|labels).*\.(csv|tsv|json)", re.IGNORECASE)
"""Of files in a run directory that are read: browsers number a second download, notes (1).csv."""
CHECKPOINT = re.compile(r"at_step_[0-9]+")
"""Name of a checkpoint's folder (train/snapshot.py)."""
LONGEST = 1000
"""Characters of a label."""


class Note(Record):
    """A person's or a program's label of a latent."""

    label: str
    """One line; empty for a latent that has only a score or a star."""
    score: float | None
    """How good the label is, on its source's own scale; for source "page", 1 is a star."""
    source: str
    """Who said it; "page": written in the report page."""

    @property
    def text(self) -> str:
        """For a line of other text: the label, or the star that stands alone."""
        return self.label or "★"


def notes_of(run_dir: Path, layer: int, n_latents: int) -> dict[int, Note]:
    """Latent -> note, from the file of notes in the run's directory; empty if there is none.

    A checkpoint that is evaluated has its folder, at_step_N, in the run's directory; without a file of notes there, the
    run's is read. Raises `InputError` for two files, and what `read_notes` raises.
    """
    files = sorted(path for path in run_dir.glob("*") if NAMES.fullmatch(path.name))
    if not files and CHECKPOINT.fullmatch(run_dir.name):
        return notes_of(run_dir.parent, layer, n_latents)
    if len(files) > 1:
        names = ", ".join(path.name for path in files)
        raise InputError(f"{run_dir}: expected one file of notes, found {names}; keep one of them there")
    return read_notes(files[0], layer, n_latents) if files else {}


def read_notes(path: Path, layer: int, n_latents: int) -> dict[int, Note]:
    """A file of notes of `layer`'s latents.

    Commas, semicolons or tabs; UTF-8, with a byte order mark or without. Other columns and empty lines are
    ignored. Raises `InputError` for a file that cannot be read, a line of another layer or of a latent that the run
    does not have, a duplicate latent, and a line with neither label nor score.
    """
    try:
        data = path.read_bytes()
    except OSError as error:  # a link to a file that has gone too
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise InputError(f"{path}: expected UTF-8, found UTF-16; save it as CSV UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}; save it as CSV UTF-8") from error
    is_json = path.suffix.lower() == ".json"
    if not is_json and text.lstrip().startswith(("[", "{")):
        raise InputError(f"{path}: holds JSON; name it {path.stem}.json")
    notes: dict[int, Note] = {}
    seen: dict[int, str] = {}
    for place, values in (_objects if is_json else _lines)(path, text):
        try:
            latent, note = _note(values, layer, n_latents)
        except ValueError as error:
            raise InputError(f"{path}: {place}: {error}") from error
        if latent in notes:
            raise InputError(
                f"{path}: {place}: latent {latent} is already in {seen[latent]}; keep one of them"
            )
        notes[latent], seen[latent] = note, place
    return notes


def _lines(path: Path, text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Where each line of a CSV file is, and its values by column."""
    first, _, rest = text.partition("\n")
    before = 0
    if re.fullmatch(r"sep=[,;\t]\s*", first):  # a spreadsheet's own line
        first, text, before = rest.partition("\n")[0], rest, 1
    delimiter = max(",;\t", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    names: list[str] | None = None
    try:
        for fields in reader:
            place = f"line {before + reader.line_num}"
            if not any(field.strip() for field in fields):
                continue
            if names is None:
                names = _header(path, place, fields)
            elif any(field.strip() for field in fields[len(names) :]):
                raise InputError(
                    f"{path}: {place}: expected {len(names)} values, found {len(fields)}; a label with "
                    f"{delimiter!r} in it needs double quotes"
                )
            else:
                values = dict(zip(names, (field.strip() for field in fields), strict=False))
                if delimiter != ",":
                    values["score"] = re.sub(r"^(-?\d+),(\d+)$", r"\1.\2", values.get("score", ""))
                yield place, values
    except csv.Error as error:
        raise InputError(f"{path}: line {before + reader.line_num}: {first_line(error)}") from error
    if names is None:
        raise InputError(f"{path}: expected a first line with the columns {', '.join(COLUMNS)}, found none")


def _header(path: Path, place: str, fields: list[str]) -> list[str]:
    names = [field.strip().lower() for field in fields]
    missing = [name for name in NEEDED if name not in names]
    twice = [name for name in COLUMNS if names.count(name) > 1]
    if missing or twice:
        what = f"no column {missing[0]}" if missing else f"column {twice[0]} twice"
        raise InputError(
            f"{path}: {place}: {what}; expected {', '.join(COLUMNS)} (the last two may be left out), found "
            f"{shown(', '.join(names))}"
        )
    return names


def _objects(path: Path, text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Which object of a JSON array it is, and its values."""
    try:
        objects = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {first_line(error)}") from error
    if not isinstance(objects, list):
        raise InputError(
            f"{path}: expected a JSON array of objects with {', '.join(COLUMNS)}, found {shown(objects)}"
        )
    for number, each in enumerate(objects, 1):
        place = f"object {number}"
        if not isinstance(each, dict):
            raise InputError(f"{path}: {place}: expected an object, found {shown(each)}")
        if missing := [name for name in NEEDED if name not in each]:
            raise InputError(f"{path}: {place}: no key {missing[0]}; expected {', '.join(COLUMNS)}")
        yield place, each


def _note(values: Mapping[str, Any], layer: int, n_latents: int) -> tuple[int, Note]:
    """A latent and its note; ValueError with what is wrong."""
    if (found := _whole("layer", values["layer"])) != layer:
        raise ValueError(f"layer: expected {layer}, the run's, found {found}")
    latent = _whole("latent", values.get("latent"))
    if latent >= n_latents:
        raise ValueError(f"latent: expected 0 to {n_latents - 1}, found {latent}")
    label, source = (_words(name, values.get(name)) for name in ("label", "source"))
    score = _score(values.get("score"))
    if not label and score is None:
        raise ValueError(f"latent {latent}: no label and no score; give one, or remove the line")
    return latent, Note(label=label, score=score, source=source)


def _whole(name: str, value: Any) -> int:
    """The number that a file writes as 12, "12" or, with gaps in the column, as 12.0."""
    text = "" if value is None or isinstance(value, bool) else str(value)
    if not re.fullmatch(r"[0-9]{1,9}(\.0)?", text):
        raise ValueError(f"{name}: expected a whole number from 0, found {shown(value)}")
    return int(text.partition(".")[0])


def _words(name: str, value: Any) -> str:
    """Text in one line."""
    if not isinstance(value, str | None):
        raise ValueError(f"{name}: expected text, found {shown(value)}")
    text = " ".join((value or "").split())
    if re.search("[\ud800-\udfff]", text):
        raise ValueError(f"{name}: half of a surrogate pair")
    if len(text) > LONGEST:
        raise ValueError(f"{name}: expected at most {LONGEST:,} characters, found {len(text):,}")
    return text


def _score(value: Any) -> float | None:
    if value is None or value == "":
        return None
    try:
        score = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        score = math.nan
    if not math.isfinite(score):
        raise ValueError(f"score: expected a number or nothing, found {shown(value)}")
    return score

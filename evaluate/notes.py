"""Labels of a run's latents: a person's in notes.csv or notes.json in the run directory, a language model's in
explanations.csv or explanations.json beside it. Imports no torch.

Columns (or keys of each object of a JSON array): layer, latent, label; score, source and weights may be left out. The
report page saves a file of notes, `make explain` one of explanations; labels that another program made are read the
same way.
"""

import csv
import functools
import io
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from common.errors import InputError, first_line, shown
from common.files import sha256
from evaluate.records import Record

COLUMNS = ("layer", "latent", "label", "score", "source")
NEEDED = COLUMNS[:3]
NAMES = re.compile(r"(notes|labels).*\.(csv|tsv|json)", re.IGNORECASE)
"""Of files in a run directory that are read: browsers number a second download, notes (1).csv."""
EXPLANATIONS = re.compile(r"explanations.*\.(csv|json)", re.IGNORECASE)
WEIGHTS, DIGITS = "weights", 12
"""Column of the weights that an explanation is of: so many first digits of their sha256."""
CHECKPOINT = re.compile(r"at_step_[0-9]+")
"""Name of a checkpoint's folder (train/snapshot.py)."""
LONGEST = 1000
"""Characters of a label."""


class Note(Record):
    """What was said of a latent: by a person, by a program, or by both."""

    label: str
    """One line; empty for a latent that has only a score or a star, or only an explanation."""
    score: float | None
    """How good the label is, on its source's own scale; for source "page", 1 is a star."""
    source: str
    """Who said it; "page": written in the report page."""
    explanation: "Note | None" = None
    """What the file of explanations says of it."""

    @property
    def text(self) -> str:
        """For a line of other text: the label, or the star that stands alone, who said it and its score; then the same
        of the explanation."""
        told = [each for each in (self.source, self._scored) if each and self.source != "page"]
        own = self.label or ("★" if self.score is not None else "")
        said = f"{own} ({', '.join(told)})" if own and told else own
        return "; ".join(part for part in (said, self.explanation.text if self.explanation else "") if part)

    @property
    def _scored(self) -> str:
        return "" if self.score is None else f"score {self.score:.3g}"


def notes_of(run_dir: Path, layer: int, n_latents: int) -> dict[int, Note]:
    """Latent -> what the files of notes and of explanations in the run's directory say; empty if there is neither.

    A checkpoint that is evaluated has its folder, at_step_N, in the run's directory; without a file of notes there, the
    run's is read. Explanations of other weights than the run's are left out, with a line on standard error. Raises
    `InputError` for two files of one kind, and what `read_notes` raises.
    """
    notes = _read(run_dir, NAMES, "notes", layer, n_latents)
    if not notes and CHECKPOINT.fullmatch(run_dir.name):
        notes = _read(run_dir.parent, NAMES, "notes", layer, n_latents)
    explained = _read(run_dir, EXPLANATIONS, "explanations", layer, n_latents)
    nothing = Note(label="", score=None, source="")
    together = {
        latent: notes.get(latent, nothing).model_copy(update={"explanation": each})
        for latent, each in explained.items()
    }
    return dict(sorted((notes | together).items()))


def _read(run_dir: Path, names: re.Pattern[str], kind: str, layer: int, n_latents: int) -> dict[int, Note]:
    files = sorted(path for path in run_dir.glob("*") if names.fullmatch(path.name))
    if len(files) > 1:
        told = ", ".join(path.name for path in files)
        raise InputError(f"{run_dir}: expected one file of {kind}, found {told}; keep one of them there")
    return read_notes(files[0], layer, n_latents) if files else {}


def read_notes(path: Path, layer: int, n_latents: int) -> dict[int, Note]:
    """A file of notes, or of explanations, of `layer`'s latents.

    Commas, semicolons or tabs; UTF-8, with a byte order mark or without. Other columns and empty lines are
    ignored. A line that names other weights than those beside the file is left out, and how many is said on standard
    error. Raises `InputError` for a file that cannot be read, a line of another layer or of a latent that the run
    does not have, a duplicate latent, and a line with neither label nor score.
    """
    notes: dict[int, Note] = {}
    seen: dict[int, str] = {}
    stale = 0
    present = functools.cache(lambda: _weights(path.parent))
    for place, values in table_rows(path):
        try:
            latent, note = note_in(values, layer, n_latents)
        except ValueError as error:
            raise InputError(f"{path}: {place}: {error}") from error
        if not of_weights(values, present):
            stale += 1
            continue
        if latent in notes:
            raise InputError(
                f"{path}: {place}: latent {latent} is already in {seen[latent]}; keep one of them"
            )
        notes[latent], seen[latent] = note, place
    if stale:
        print(f"{path}: {stale:,} lines are of other weights than the run's: left out", file=sys.stderr)
    return notes


def of_weights(values: Mapping[str, Any], present: Callable[[], str]) -> bool:
    """Whether a row of a table is of the weights whose sha256 `present` gives, or names none."""
    of = values.get(WEIGHTS)
    named = isinstance(of, str) and re.fullmatch(r"[0-9a-f]{8,64}", of)
    return not named or present().startswith(str(of))


def table_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Where each row of a CSV file or object of a JSON array is, and its values by column."""
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
    yield from (_objects if is_json else _lines)(path, text)


def _weights(run_dir: Path) -> str:
    """sha256 of the run's weights; empty where there are none."""
    from transcoder.weights import FILE_NAME  # with torch

    file = run_dir / FILE_NAME
    return sha256(file) if file.is_file() else ""


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


def note_in(values: Mapping[str, Any], layer: int, n_latents: int) -> tuple[int, Note]:
    """The latent of a row and its note; ValueError with what is wrong."""
    if (found := whole("layer", values["layer"])) != layer:
        raise ValueError(f"layer: expected {layer}, the run's, found {found}")
    latent = whole("latent", values.get("latent"))
    if latent >= n_latents:
        raise ValueError(f"latent: expected 0 to {n_latents - 1}, found {latent}")
    label, source = (_words(name, values.get(name)) for name in ("label", "source"))
    score = _score(values.get("score"))
    if not label and score is None:
        raise ValueError(f"latent {latent}: no label and no score; give one, or remove the line")
    return latent, Note(label=label, score=score, source=source)


def whole(name: str, value: Any) -> int:
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

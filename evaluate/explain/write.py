"""explanations.csv, which evaluate/notes.py reads, and the pages that show it."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path

from common.errors import InputError
from common.files import locked, write_whole
from common.tokens import printable
from evaluate.kept.evaluations import read_all
from evaluate.notes import COLUMNS, DIGITS, EXPLANATIONS, LONGEST, WEIGHTS, Note, notes_of, read_notes
from evaluate.report.sides import show_notes

FILE = "explanations.csv"


def refuse_another_file(run_dir: Path) -> None:
    """Raise `InputError` where a file of explanations is there under another name: two would not be read."""
    for path in sorted(run_dir.glob("*")):
        if path.is_file() and EXPLANATIONS.fullmatch(path.name) and path.name != FILE:
            raise InputError(
                f"{path}: explanations are written to {FILE} beside it, and one file of them is read; remove it, or "
                "move it elsewhere"
            )


def write_explanations(
    run_dir: Path, layer: int, n_latents: int, weights_sha256: str, said: Mapping[int, Note]
) -> Path:
    """Add explanations to those of the same weights that are there, in place of older ones of the same latents; show
    all of them in the pages of the run's evaluations."""
    refuse_another_file(run_dir)
    path = run_dir / FILE
    with locked(run_dir / ".evaluation", None):  # two commands that write here keep each other's lines
        there = read_notes(path, layer, n_latents) if path.is_file() else {}
        write_whole(path, _table(layer, weights_sha256, there | dict(said)))
        show_notes(read_all(run_dir), weights_sha256, notes_of(run_dir, layer, n_latents))
    return path


def _table(layer: int, weights_sha256: str, notes: Mapping[int, Note]) -> bytes:
    lines = io.StringIO(newline="")
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow((*COLUMNS, WEIGHTS))
    for latent, note in sorted(notes.items()):
        score = "" if note.score is None else f"{note.score:.4g}"
        writer.writerow((layer, latent, note.label, score, note.source, weights_sha256[:DIGITS]))
    return lines.getvalue().encode()


def as_note(label: str, score: float | None, source: str) -> Note:
    """An explanation as it is read again: of any text, also what a terminal would obey or UTF-8 cannot hold."""
    return Note(label=_line(label), score=score, source=_line(source))


def _line(text: str) -> str:
    line = printable(" ".join(text.split()))
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…"

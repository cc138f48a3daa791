"""What evaluate and compare print alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from common.numbers import Uncertain
from common.terminal.table import Table

if TYPE_CHECKING:  # --help does not wait for the records
    from evaluate.records import ErrorMetrics, LanguageMetrics


def table_of(title: str, columns: tuple[str, ...]) -> Table:
    """An empty table with its title and columns."""
    return Table(*columns, title=title)


def rows_of(rows: int, split: str) -> str:
    """How many rows of which split, in words."""
    return f"{rows:,} {split_name(split)} rows"


def split_name(split: str) -> str:
    """A split in words."""
    return "held-out" if split == "heldout" else split


def plain(console: Console, text: str) -> None:
    """A line as it is: paths are neither wrapped nor coloured."""
    console.print(text, soft_wrap=True, highlight=False, markup=False)


def increase(language: LanguageMetrics | None, dash: str = "-") -> Uncertain | str:
    """What the cross-entropy rises by, with its standard error; a dash where that was not measured."""
    if language is None or language.increase is None:
        return dash
    return Uncertain(language.increase, language.increase_error)


def typical_fvu(errors: ErrorMetrics, g: int) -> float | None:
    """The FVU of prefix `g` without heavy rows; none where there are none, or where it is undefined."""
    return None if errors.heavy is None else errors.typical.fvu[g]

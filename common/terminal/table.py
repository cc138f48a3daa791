"""The tables of all stages, in one style: no wider than the terminal, and nothing in them is cut."""

import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from common.numbers import MARK, Uncertain, aligned

NUMBER = re.compile(rf"[+-]?[\d.,]+(e[+-]?\d+)?%?( .*)?{MARK}?")
"""A number, and perhaps a unit or more after it."""
PIPE = 240
"""Columns of a file or a pipe: nobody looks at its edge, and a search finds a whole row in one line."""
LONG = 26
"""Characters of a path or a name that stand in one line where a table is too wide."""
BORDER = 3
"""Characters that a column takes beside its own; a table has one more."""


class Table:
    """A title, and rows of cells under headings; markup in them is text.

    A column of numbers is as wide as its widest; headings and words break at spaces. Columns that do not fit beside
    each other stand in further tables below, which begin with the first `keys` columns too. A long path or name
    goes on in the next line then.
    """

    def __init__(self, *columns: str, title: str = "", caption: str = "", keys: int = 1) -> None:
        self.columns, self.title, self.caption, self.keys = columns, title, caption, keys
        self.rows: list[tuple[str | Uncertain, ...]] = []
        self._sections: set[int] = set()

    def add_row(self, *cells: str | Uncertain) -> None:
        """A row, with a cell for each heading; lines in a cell stay lines. See `aligned` for numbers with errors."""
        if len(cells) != len(self.columns):
            raise ValueError(f"expected {len(self.columns)} cells, found {len(cells)}")
        self.rows.append(cells)

    def add_section(self) -> None:
        """A line below the last row."""
        self._sections.add(len(self.rows) - 1)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        cells = [aligned([row[c] for row in self.rows]) for c in range(len(self.columns))]
        columns = [Column(*pair) for pair in zip(self.columns, cells, strict=True)]
        if _outer([column.least for column in columns]) > options.max_width:
            columns = [Column(column.heading, [*map(broken, column.cells)]) for column in columns]
        if self.title:
            yield Text(self.title, style="table.title", overflow="fold")
        for block in blocks([column.least for column in columns], self.keys, options.max_width):
            yield self._part([columns[c] for c in block], options.max_width)
        if self.caption:
            yield Text(self.caption, style="table.caption", overflow="fold")

    def _part(self, columns: "Sequence[Column]", room: int) -> RichTable:
        table = RichTable(box=box.HEAVY_HEAD)
        wide = widths(columns, room)
        for column, width in zip(columns, wide, strict=True):
            justify = "right" if column.is_numbers else "left"
            heading = Text(column.heading, justify=justify)
            # rich removes the spaces at the end of what it puts to the right
            own = "left" if column.is_marked else justify
            table.add_column(heading, width=width, justify=own, overflow="fold")
        shown = [column.laid(width) for column, width in zip(columns, wide, strict=True)]
        for number in range(len(self.rows)):
            table.add_row(*(Text(cells[number]) for cells in shown), end_section=number in self._sections)
        return table


class Column:
    """A heading and its cells, and how wide they are."""

    def __init__(self, heading: str, cells: Sequence[str]) -> None:
        self.heading, self.cells = heading, cells
        told = [cell for cell in cells if cell not in ("", "-")]
        self.is_numbers = all(NUMBER.fullmatch(cell) for cell in told)
        lines = [line for cell in cells for line in cell.splitlines()]
        whole = lines if self.is_numbers else [word for line in lines for word in line.split()]
        self.is_marked = self.is_numbers and any(cell.endswith(MARK) for cell in told)
        if self.is_marked:
            whole = lines = [line if line.endswith(MARK) else f"{line} " for line in lines]
        self.least = _widest([*heading.split(), *whole])
        self.wanted = _widest([heading, *lines])

    def laid(self, width: int) -> list[str]:
        """The cells; where some are marked, each with the spaces that put its last digit below the others'."""
        if not self.is_marked:
            return [*self.cells]
        return [(cell if cell.endswith(MARK) else f"{cell} ").rjust(width) for cell in self.cells]


def broken(cell: str) -> str:
    """The cell with lines of at most `LONG` in words longer than that, which end after one of / - _ . where they can.

    >>> broken("export/gemma_scope_prefix_1/layer_3 1.5")
    'export/gemma_scope_\\nprefix_1/layer_3 1.5'
    """
    return "".join(map(_lines, re.split(r"(\s+)", cell)))


def _lines(word: str) -> str:
    if len(word) <= LONG:
        return word
    end = max(word.rfind(mark, 0, LONG) for mark in "/-_.") + 1 or LONG
    return f"{word[:end]}\n{_lines(word[end:])}"


def _widest(texts: Sequence[str]) -> int:
    return max(map(cell_len, texts), default=1) or 1


def blocks(least: Sequence[int], keys: int, room: int) -> list[list[int]]:
    """Which columns stand beside each other, by number: as many as fit `room`, the first `keys` of them every time.

    >>> blocks([5, 4, 20, 4], keys=1, room=40)
    [[0, 1, 2], [0, 3]]
    """
    found, first = list[list[int]](), [*range(min(keys, len(least)))]
    block = first
    for c in range(len(first), len(least)):
        if block != first and _outer([least[each] for each in (*block, c)]) > room:
            found.append(block)
            block = first
        block = [*block, c]
    return [*found, block]


def _outer(widths: Sequence[int]) -> int:
    return sum(widths) + BORDER * len(widths) + 1


def widths(columns: Sequence[Column], room: int) -> list[int]:
    """How wide each is: what it needs at least, and of what is left over what it wants, the smallest wish first.

    Where even the least is too much, the widest columns give way.
    """
    found = [column.least for column in columns]
    while _outer(found) > room and max(found) > 1:
        found[found.index(max(found))] -= 1
    spare = room - _outer(found)
    for c in sorted(range(len(columns)), key=lambda c: columns[c].wanted - found[c]):
        more = max(0, min(spare, columns[c].wanted - found[c]))
        found[c] += more
        spare -= more
    return found


def console(**options: Any) -> Console:
    """Standard output; of a terminal, as wide as that is, or as COLUMNS says."""
    found = Console(**options)
    return found if found.is_terminal or "COLUMNS" in os.environ else Console(**options, width=PIPE)

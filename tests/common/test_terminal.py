"""Tables that fit the terminal: what stands beside what, and that no number and no word is cut."""

import io
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from common.terminal.table import Column, Table, blocks, broken, console, widths


def printed(table: Table, width: int = 80) -> str:
    said = Console(width=width, file=io.StringIO())
    said.print(table)
    return said.file.getvalue()  # type: ignore[attr-defined]


def cells(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if "│" in line
    ]


def test_what_fits_is_one_table_as_wide_as_its_cells() -> None:
    table = Table("run", "FVU", title="held-out rows")
    table.add_row("a[b]", "0.324")
    assert printed(table).splitlines() == [
        "held-out rows",
        "┏━━━━━━┳━━━━━━━┓",
        "┃ run  ┃   FVU ┃",
        "┡━━━━━━╇━━━━━━━┩",
        "│ a[b] │ 0.324 │",
        "└──────┴───────┘",
    ]


def test_numbers_are_right_and_words_left() -> None:
    assert Column("", ["1", "-", "", "1,638,400", "+0.1", "1.5e-05", "12.0 % good", "1.2 GB"]).is_numbers
    assert Column("", ["-", ""]).is_numbers
    assert not Column("", ["1", "a1"]).is_numbers
    assert not Column("", ["12:3.4  5:1.2"]).is_numbers


def test_columns_that_do_not_fit_stand_below_with_the_first() -> None:
    assert blocks([5, 4, 20, 4], keys=1, room=40) == [[0, 1, 2], [0, 3]]
    assert blocks([5, 4], keys=1, room=3) == [[0, 1]]  # no room at all: still all of them
    assert blocks([5, 5, 30, 30], keys=2, room=50) == [[0, 1, 2], [0, 1, 3]]
    assert blocks([5], keys=1, room=80) == [[0]]


def test_headings_give_way_first_and_numbers_never() -> None:
    columns = [Column("top-1 agreement", ["97.5"]), Column("cross-entropy", ["3.214"])]
    assert [column.least for column in columns] == [9, 13]
    assert widths(columns, 80) == [15, 13]
    assert widths(columns, 9 + 13 + 7) == [9, 13]


def test_a_long_name_breaks_at_its_marks_only_where_the_table_is_too_wide() -> None:
    name = "gemma_scope_prefix_1/layer_3/width_864/average_l0_18"
    assert broken(name).splitlines() == ["gemma_scope_prefix_1/", "layer_3/width_864/average_", "l0_18"]
    assert broken("x" * 30) == "x" * 26 + "\n" + "xxxx"
    table = Table("transcoder", *"abcdefgh")
    table.add_row(name, *["0.123"] * 8)
    assert name in printed(table, 240)
    assert "".join(row[0] for row in cells(printed(table, 100))) == name


def test_a_row_of_other_length_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 2 cells, found 1"):
        Table("a", "b").add_row("1")


WORD = st.text("abcdefghij-_/.", min_size=1, max_size=24)
CELL = st.one_of(
    st.integers(-(10**7), 10**7).map("{:,}".format),
    st.floats(0, 1e4).map("{:.3f}".format),
    st.lists(WORD, min_size=0, max_size=4).map(" ".join),
    st.just("-"),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 3), st.data())
def test_any_table_keeps_to_80_columns_and_every_word(n: int, keys: int, data: st.DataObject) -> None:
    headings = data.draw(st.lists(WORD, min_size=n, max_size=n))
    rows = data.draw(st.lists(st.lists(CELL, min_size=n, max_size=n), min_size=1, max_size=4))
    keys = min(keys, n)
    if (
        sum(
            max(map(len, (heading, *" ".join(row[c] for row in rows).split(" "))))
            for c, heading in enumerate(headings[:keys])
        )
        > 40
    ):
        keys = 1  # keys that leave no room for another column
    table = Table(*headings, keys=keys)
    for row in rows:
        table.add_row(*row)
    text = printed(table)
    assert "…" not in text
    assert all(len(line) <= 80 for line in text.splitlines())
    said = {word for line in re.split(r"[\n┃│]", text) for word in line.split()}
    assert {word for row in rows for cell in row for word in cell.split()} <= said


def test_a_pipe_has_room_and_columns_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert console(file=io.StringIO()).width == 240
    monkeypatch.setenv("COLUMNS", "80")
    assert console(file=io.StringIO()).width == 80

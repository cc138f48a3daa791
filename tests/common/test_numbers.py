"""Numbers as the console, the log and the pages write them."""

import pytest

from common.numbers import Uncertain, aligned, marked_fvu, number_or_dash, percent_or_dash
from evaluate.report.templates import number, percent


def test_a_number_or_a_dash() -> None:
    assert [number_or_dash(0.12345), number_or_dash(None), number_or_dash(0.12345, ".4f")] == [
        "0.123",
        "-",
        "0.1235",
    ]
    assert number_or_dash(None, ",", "–") == "–"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0, "0"),
        (12345, "12,345"),
        (0.012345, "0.0123"),
        (999.4, "999"),
        (-1234.5, "-1,234"),
        (1e6, "1,000,000"),
    ],
)
def test_numbers_of_the_pages(value: float | None, text: str) -> None:
    assert number(value) == text


def test_shares_are_percentages() -> None:
    assert [percent(None), percent(0.1234), percent(1)] == ["–", "12.3", "100"]
    assert [percent_or_dash(None), percent_or_dash(0.1234)] == ["-", "12.3 %"]


def test_errors_of_a_column_have_the_decimals_of_the_smallest() -> None:
    cells = aligned([Uncertain(0.0363, 0.0006), Uncertain(0.07412, 0.007), Uncertain(-0.5, None), "-"])
    assert cells == ["+0.0363 ± 0.0006", "+0.0741 ± 0.0070", "-0.5000", "-"]
    assert aligned([Uncertain(0.07412, 0.007), Uncertain(0.5, 0)]) == ["+0.074 ± 0.007", "+0.500 ± 0.000"]


def test_an_fvu_without_heavy_rows_is_marked() -> None:
    assert [marked_fvu(0.969, 0.442), marked_fvu(0.431, None)] == ["0.442†", "0.431"]
    assert marked_fvu(0.9, 0.0) == "0.000†"

"""Numbers as the console, the log and the pages write them."""

import pytest

from common.numbers import number_or_dash, percent_or_dash
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

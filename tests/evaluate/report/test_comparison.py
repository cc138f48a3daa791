"""compare.html in headless Chromium, and the tables behind plots."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest

from evaluate.comparison.page import aligned, cell, write_page
from evaluate.comparison.records import Comparison
from evaluate.metrics.side_by_side import COLUMNS
from evaluate.report import plotted
from tests.evaluate.report.test_page import HOSTILE, Opened, browser  # noqa: F401
from tests.golden.write import GOLDEN

OTHER = HOSTILE[0] + "/a-long-folder-of-another-tool/average_l0_18"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run with two prefixes and of another transcoder with as many latents as its last."""
    folder = tmp_path_factory.mktemp("comparison")
    values = json.loads((GOLDEN / "compare.json").read_text())
    values["lines"][-1] |= {"transcoder": OTHER, "fvu": 0.2, "l0": 9.0}
    values["lines"][-1]["equal_latents"]["fvu"] = -0.1858
    values["lines"][-1]["difference"]["fvu"] = -0.5
    values["transcoders"][-1]["transcoder"] = OTHER
    values["transcoders"][-1]["report"] = "../../run #2/evaluation/report.html"
    values["equal_l0"] = []
    values["differing_settings"] = {
        "train.lr": {"demo": 0.003},
        "transcoder.group_sizes": {"demo": [288, 1728]},
    }
    write_page(folder, Comparison.model_validate(values))
    return folder / "compare.html"


@pytest.fixture
def opened(browser: Any, page: Path) -> Iterator[Opened]:  # noqa: F811
    found = Opened(browser, page)
    yield found
    found.close()


def column(opened: Opened, place: int) -> list[str]:
    """A column of the table, from the top, without the headings of groups."""
    return opened.page.eval_on_selector_all(
        "#lines tbody tr:not(.group)",
        f"rows => rows.map(r => r.cells[{place}].firstChild.textContent.trim())",
    )


def test_rows_stand_by_latents_and_sort_within_them_or_across(opened: Opened) -> None:
    page = opened.page
    assert page.locator("tr.group:visible").all_inner_texts() == ["288 latents", "2,016 latents"]
    assert column(opened, 2) == ["288", "2,016", "2,016"]
    page.click("th[data-key=fvu] button")
    assert column(opened, 3) == ["0.572", "0.200", "0.386"]
    assert page.get_attribute("th[data-key=fvu]", "aria-sort") == "ascending"
    page.click("th[data-key=fvu] button")
    assert column(opened, 3) == ["0.572", "0.386", "0.200"]
    page.uncheck("#grouped")
    page.click("th[data-key=l0] button")
    assert column(opened, 4) == ["9.0", "16.1", "28.7"]
    assert page.locator("tr.group:visible").count() == 0
    page.click("th[data-key=transcoder] button")
    assert column(opened, 0)[0] == OTHER


def test_one_difference_at_a_time(opened: Opened) -> None:
    assert opened.page.locator("#lines small:visible", has_text="-0.186").count() == 1
    assert opened.page.locator("#lines small:visible", has_text="-0.500").count() == 0
    opened.page.check("#to-full")
    assert opened.page.locator("#lines small:visible", has_text="-0.186").count() == 0
    assert opened.page.locator("#lines small:visible", has_text="-0.500").count() == 1


def test_what_is_not_equal_or_not_known_is_said(opened: Opened) -> None:
    text = opened.page.inner_text("main")
    assert f"No equal L0: demo has 16.1 to 28.7, {OTHER} has 9.0." in text
    assert f"Not known of {OTHER}" in text
    assert "train.lr\t0.003" in text
    link = opened.page.get_by_role("link", name=OTHER)
    assert link.get_attribute("href") == "../../run%20%232/evaluation/report.html"
    assert "transcoder.group_sizes\t288, 1728" in text
    assert opened.page.evaluate("window.hacked") is None


@pytest.mark.parametrize("width", [400, 1400])
def test_dark_light_and_narrow(browser: Any, page: Path, width: int) -> None:  # noqa: F811
    opened = Opened(browser, page, width=width)
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    before = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    opened.page.click("#theme")
    assert opened.page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    opened.page.reload()
    assert opened.page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    opened.close()


def test_the_numbers_of_a_plot_unfold_and_are_saved(opened: Opened) -> None:
    table = opened.page.locator("details.plotted table")
    assert not table.is_visible()
    opened.page.click("details.plotted summary")
    assert table.is_visible()
    with opened.page.expect_download() as saved:
        opened.page.click("details.plotted a")
    assert saved.value.suggested_filename == "compare.csv"
    rows = [*csv.reader(Path(saved.value.path()).read_text().splitlines())]
    assert rows[0] == ["", "prefix", "L0", "FVU"]
    assert rows[3] == [OTHER, "0", "9.0", "0.2"]


def numbers(markup: str) -> list[list[str]]:
    """The CSV in the table's link."""
    return [*csv.reader(unquote(markup.split("charset=utf-8,")[1].split('"')[0]).splitlines())]


def test_a_csv_has_every_digit_and_the_table_four() -> None:
    markup = plotted.table("name", {"<b>": ["a,b", None], "FVU": [0.123456789, None], "rows": [1_638_400, 2]})
    assert numbers(markup) == [["<b>", "FVU", "rows"], ["a,b", "0.123456789", "1638400"], ["", "", "2"]]
    assert "<th>&lt;b&gt;</th>" in markup
    assert (
        "<tr><td>a,b</td><td>0.1235</td><td>1,638,400</td></tr><tr><td>–</td><td>–</td><td>2</td></tr>"
        in markup
    )


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ((0.93, 0.736, None), ["0.930", "0.736", "–"]),
        ((4.2e-5, 7e-6), ["0.0000420", "0.0000070"]),
        ((12345.6, 1.5), ["12346", "2"]),
        ((0.0, None), ["0.00", "–"]),
    ],
)
def test_the_mean_squared_error_has_the_same_decimals_in_every_row(
    values: tuple[float | None, ...], shown: list[str]
) -> None:
    column = aligned(COLUMNS["mse"], values)
    assert [cell(column, value) for value in values] == shown
    assert aligned(COLUMNS["fvu"], values) == COLUMNS["fvu"]


def test_columns_are_the_numbers_that_are_drawn() -> None:
    """Each against its plot, or by hand."""
    latents = {"log10_density_edges": np.arange(-4.0, 1).tolist(), "dead": 0, "n": 3, "rows": 10}
    found = plotted.density_histogram(latents, [np.array([0.05, 0.5]), np.array([0.02])])
    assert found == {
        "log10 of share of rows, from": [-2, -1],
        "to": [-1, 0],
        "latents, group 0": [1, 1],
        "latents, group 1": [1, 0],
    }
    found = plotted.specificity(
        [{"density": np.array([0.1, 0.3]), "entropy": np.zeros(0), "top_share": np.ones(1)}]
    )
    assert found["50 %"] == [pytest.approx(20), None, 100]
    groups = [
        {"start": 0, "end": 1, "l0": 1, "energy_share": 0.25},
        {"start": 1, "end": 4, "l0": 3, "energy_share": 0.75},
    ]
    found = plotted.group_contributions(groups, [{"fvu": 0.5}, {"fvu": 0.4}])
    assert found["latents (%)"] == [25, 75]
    assert found["variance explained by adding it (%)"] == pytest.approx([100 * 5 / 6, 100 / 6])
    errors = {
        "by_size": [{"class": 1, "rows": 3, "error_share": 0.5, "fvu": [0.1]}],
        "size_edges": [-2, -1, 1],
    }
    assert plotted.error_by_size(errors) == {
        "distance from the mean": [1.0],
        "rows (%)": [100],
        "squared error (%)": [50],
        "FVU, prefix 0": [0.1],
    }
    log = [{"rows": 1, "loss": 2.0}, {"rows": 2}, {"rows": 3, "loss": 1.0, "heldout_fvu/prefix_0": 0.5}]
    assert plotted.loss_curve(log) == {
        "training rows": [1, 3],
        "training loss": [2.0, 1.0],
        "held-out FVU, prefix 0": [None, 0.5],
    }
    assert plotted.l0_histogram([{"l0_histogram": [1]}, {"l0_histogram": [1, 2]}]) == {
        "active latents": [0, 1],
        "rows, prefix 0": [1, 0],
        "rows, prefix 1": [1, 2],
    }

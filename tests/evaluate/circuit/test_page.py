"""circuit.html in headless Chromium: click, keys, links to reports, hostile text, a phone, no network."""

import re
from pathlib import Path
from typing import Any

import pytest

from evaluate.circuit.graph import paths, pruned
from evaluate.circuit.labels import Label
from evaluate.circuit.write import About, circuit_page
from tests.evaluate.circuit.test_graph import graph
from tests.evaluate.report.test_page import HOSTILE, Opened, browser

__all__ = ["browser"]
ABOUT = About("tiny", "a", 1, 2, "".join(HOSTILE), ["<s>", HOSTILE[1]], 100, {})


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nodes in order: token, latent 7 of layer 0, error, latent 3 of layer 1, two logits."""
    circuit = pruned(graph(), 1.0, 1.0)
    labels = [
        Label(f"said {bad}", bad, [bad, *HOSTILE], [bad], like_random=node == 1)
        for node, bad in enumerate(HOSTILE[: len(circuit.nodes)])
    ]
    routes = {logit: paths(circuit, logit, 5) for logit in (4, 5)}
    file = tmp_path_factory.mktemp("page") / "circuit.html"
    file.write_text(
        circuit_page(ABOUT, circuit, labels, routes, {1: "../a%22b/report.html"}), encoding="utf-8"
    )
    return file


def clean(opened: Opened) -> None:
    assert opened.said == []
    assert [address for address in opened.requested if not address.startswith("file:")] == []
    assert opened.page.evaluate("window.hacked") is None


def test_a_click_shows_what_a_latent_reads_and_writes(browser: Any, page: Path) -> None:
    opened = Opened(browser, page)
    assert opened.page.locator(".dot").count() == 6
    assert "Choose a node" in opened.page.inner_text("#node")
    opened.page.locator('.dot[data-node="3"]').click()
    detail = opened.page.inner_text("#node")
    assert detail.startswith("Layer 1, latent 3")
    values = opened.page.locator("#node .ends .value").all_inner_texts()
    assert values == ["+75 %", "−25 %", "−50 %", "+50 %"]  # from a and the error; to x, then to y
    assert opened.page.locator("#node a").get_attribute("href") == "../a%22b/report.html#latents/3/prefix-1"
    assert opened.page.locator(".link.own").count() == 4
    opened.page.locator("#node .ends button").first.click()
    assert "tokens say little" not in detail
    assert opened.page.inner_text("#node").startswith("Layer 0, latent 7")
    assert "tokens say little" in opened.page.inner_text("#node")
    assert opened.page.locator("#node a").count() == 0  # layer 0 has no report
    opened.page.locator(".routes button").first.click()
    assert opened.page.inner_text("#node").startswith("Token")
    clean(opened)


def test_keys_lead_everywhere(browser: Any, page: Path) -> None:
    opened = Opened(browser, page)

    def said(*keys: str) -> str:
        for key in keys:
            opened.page.keyboard.press(key)
        return opened.page.inner_text("#node h2")

    opened.page.locator("#links").focus()
    assert said("Tab") == "Next token"
    assert said("ArrowDown") == "Layer 1, latent 3"
    assert said("ArrowDown") in ("Layer 0, latent 7", "Error of layer 0")
    assert said("ArrowLeft") == "Layer 0, latent 7"
    assert said("ArrowRight") == "Error of layer 0"
    assert said("ArrowUp") == "Layer 1, latent 3"
    assert said("Enter") == "Layer 0, latent 7"  # its strongest source
    assert said("Enter") == "Token"
    assert said("Escape") == "Nodes with most influence"
    clean(opened)


def test_hostile_text_is_text(browser: Any, page: Path) -> None:
    opened = Opened(browser, page)
    for node in range(6):
        opened.page.locator(f'.dot[data-node="{node}"]').click()
        assert opened.page.locator("#node img, #node script, #node svg, main > svg").count() == 0
    assert "<img src=x onerror=window.hacked=1>" in opened.page.inner_text("h1")
    assert not re.search(r"<(img|svg|iframe)\b", page.read_text().split("<main>")[1])
    clean(opened)


def test_links_drawn_and_a_phone(browser: Any, page: Path) -> None:
    opened = Opened(browser, page, width=390, height=800)
    for value, drawn in (("0", "0 of 7"), ("100", "7 of 7")):
        opened.page.locator("#links").fill(value)
        assert opened.page.inner_text("#drawn") == drawn
    assert opened.page.locator(".link.negative").count() == 2
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= 390
    clean(opened)


def test_the_axis_the_tokens_and_the_next_tokens_are_in_view(browser: Any, page: Path) -> None:
    """The canvas opened at its right end, without its axis; what was written beside a next token was cut at the top."""
    opened = Opened(browser, page, width=1400, height=900)
    assert opened.page.is_hidden("#wide")
    box = opened.page.evaluate(
        "(({left, right, top, bottom}) => [left, right, top, bottom])($('canvas').getBoundingClientRect())"
    )
    for what in (".axis text", ".piece", ".said"):
        places = opened.page.eval_on_selector_all(
            what,
            "all => all.map((each) => each.getBoundingClientRect()).map((b) => [b.left, b.right, b.top, b.bottom])",
        )
        assert places
        for left, right, top, bottom in places:
            assert box[0] <= left < right <= box[1], what
            assert box[2] <= top < bottom <= min(box[3], 900), what
    narrow = Opened(browser, page, width=100, height=800)
    assert narrow.page.is_visible("#wide")
    assert narrow.page.evaluate("$('canvas').scrollLeft") > 0
    left = "document.querySelector('.axis').getBoundingClientRect().left - $('canvas').getBoundingClientRect().left"
    assert narrow.page.evaluate(left) == pytest.approx(1, abs=1)  # its border
    clean(opened)
    clean(narrow)

"""The page in headless Chromium: search, sort, open, prefixes, keys, phone, hostile text, 18,432 latents."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.tokens import TokenText
from evaluate.labels.choose import Labels
from evaluate.labels.effects import Chance, LogitEffects
from evaluate.labels.measured import Quality
from evaluate.metrics.catalogue import Catalogue
from evaluate.metrics.coactivation import Partners
from evaluate.metrics.contexts import REACH, Samples
from evaluate.metrics.redundancy import Neighbours
from evaluate.records import Metrics
from evaluate.report.page_data import page_data, script_json
from evaluate.report.report import write_report
from evaluate.run import evaluate
from shards.store import read_tokenizer
from tests.evaluate.runs import ENDS, make_run, settings_of

CHROMIUM = Path("/usr/bin/chromium")
HOSTILE = [
    "<script>window.hacked=1</script>",
    "</script><img src=x onerror=window.hacked=1>",
    "<!--<script>",
    "\"'><svg onload=window.hacked=1>",
    "{{7*7}}",
    "${window.hacked=1}",
    "javascript:alert(1)",
    "&lt;b&gt;&amp;",
    "שלום\u202e evil",
    "مرحبا",
    "🙂👩‍👩‍👧",
    "\u2028\u2029\x00\x0b",
    "\n\t\r",
    "]]>",
    '\\u003c\\"',
]
VOCABULARY = ["<s>", "</s>", *HOSTILE, *(f"word{i}" for i in range(60))]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("page")
    make_run(root, vocabulary=VOCABULARY)
    evaluate(settings_of(root), ce_tokens=0)
    return settings_of(root).run_dir() / "evaluation" / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not there (apt-get install chromium)")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Opened:
    """A page with everything that it said or asked for."""

    def __init__(
        self, browser: Any, file: Path, width: int = 1280, height: int = 800, place: str = ""
    ) -> None:
        self.page = browser.new_context(viewport={"width": width, "height": height}).new_page()
        self.said: list[str] = []
        self.requested: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append("dialog"), dialog.dismiss()))
        self.page.on("request", lambda request: self.requested.append(request.url))
        self.page.goto(f"file://{file}{place}")
        if self.page.locator("#spacer").count():  # the report reads its latents after the first paint
            self.page.wait_for_selector("[data-ready]", state="attached")

    def ids(self) -> list[int]:
        """The latents in view, from the top."""
        rows = self.page.eval_on_selector_all(
            ".row",
            "rows => rows.map(r => [+r.getAttribute('aria-posinset'), +r.dataset.f]).sort((a, b) => a[0] - b[0])",
        )
        return [f for _, f in rows]

    def selected(self) -> int:
        return int(self.page.text_content("#detail h2").split()[-1])

    def frame(self) -> None:
        """Waits until the page has drawn what it was asked for (typing is answered after 80 ms of its own clock)."""
        self.page.evaluate("new Promise((done) => setTimeout(() => requestAnimationFrame(done), 120))")

    def close(self) -> None:
        self.page.context.close()
        assert self.said == []
        assert [url for url in self.requested if not url.startswith("file://")] == []


@pytest.fixture
def opened(browser: Any, report: Path) -> Iterator[Opened]:
    page = Opened(browser, report, place="#latents")
    yield page
    page.close()


def test_hostile_text_is_shown_and_never_run(opened: Opened) -> None:
    page = opened.page
    for tab in ("overview", "nesting", "error", "about", "latents"):
        page.click(f"#tab-{tab}")
        assert page.is_visible(f"#{tab}")
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("document.scripts.length") == 3
    assert page.evaluate("document.querySelectorAll('main img, main svg[onload]').length") == 0
    strings = page.evaluate("JSON.parse(document.getElementById('data').textContent).strings")
    assert {f" {text}" for text in HOSTILE} <= set(strings)
    shown = set()
    for _ in range(6):
        shown |= set(page.eval_on_selector_all(".lines .t", "all => all.map(t => t.textContent)"))
        page.click("[aria-label='Next latent']")
    for text in HOSTILE[:4]:
        assert any(text in string for string in shown)


def test_a_script_cannot_be_added_later(opened: Opened) -> None:
    opened.page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {text: 'window.hacked=1'}))"
    )
    assert opened.page.evaluate("window.hacked") is None
    assert any("Content Security Policy" in line for line in opened.said)
    opened.said.clear()


def test_search_by_number_and_by_token(opened: Opened) -> None:
    page, everything = opened.page, opened.ids()
    assert len(everything) > 5
    page.fill("#search", "7")
    opened.frame()
    assert opened.ids()[0] == 7
    page.fill("#search", "WORD59")
    opened.frame()
    assert opened.ids()
    assert "word59" in page.inner_text("#detail")
    page.fill("#search", "<script>")
    opened.frame()
    assert opened.ids()
    page.fill("#search", "nothing says this")
    opened.frame()
    assert opened.ids() == []
    page.fill("#search", "")
    opened.frame()
    assert opened.ids() == everything


def test_the_list_sorts_by_number_and_by_firing_both_ways(opened: Opened) -> None:
    page = opened.page
    page.select_option("#sort", "number")
    assert opened.ids() == sorted(opened.ids())
    page.click("#direction")
    assert opened.ids() == sorted(opened.ids(), reverse=True)
    page.select_option("#sort", "how often it fires")
    page.click("#direction")
    shares = page.eval_on_selector_all(".row .value", "all => all.map(v => parseFloat(v.textContent))")
    assert shares == sorted(shares, reverse=True)


def test_groups_and_prefixes_narrow_the_list(opened: Opened) -> None:
    page = opened.page
    page.click("#prefix label:nth-of-type(1)")
    assert max(opened.ids()) < ENDS[0]
    assert page.is_visible(".verdicts[data-prefix='0']") is False
    page.click("#tab-overview")
    assert page.is_visible(".verdicts[data-prefix='0']")
    assert page.is_hidden(".verdicts[data-prefix='2']")
    page.click("#prefixes tbody tr:nth-child(3)")
    assert page.is_visible(".verdicts[data-prefix='2']")
    page.click("#tab-latents")
    page.click("#groups label:nth-of-type(1)")
    page.click("#groups label:nth-of-type(2)")
    assert min(opened.ids()) >= ENDS[1]


def test_a_latent_shows_its_strongest_context_first(opened: Opened) -> None:
    opened.page.locator(".row").nth(1).click()
    assert opened.selected() == opened.ids()[1]
    values = opened.page.eval_on_selector_all(
        ".lines:first-of-type .value", "all => all.map(v => parseFloat(v.textContent))"
    )
    assert values[0] == max(values)
    assert opened.page.locator(".lines li").first.locator(".focus").count() == 1
    assert opened.page.evaluate("location.hash") == f"#latent={opened.selected()}&prefix=2"


def test_keys_focus_the_search_and_move_the_selection(opened: Opened) -> None:
    page = opened.page
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "search"
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "list"
    ids, start = opened.ids(), opened.selected()
    page.keyboard.press("ArrowDown")
    assert opened.selected() == ids[ids.index(start) + 1]
    page.keyboard.press("k")
    assert opened.selected() == start
    page.keyboard.press("End")
    assert opened.selected() != start
    page.keyboard.press("1")
    assert max(opened.ids()) < ENDS[0]
    page.focus("#tab-latents")
    page.keyboard.press("ArrowRight")
    assert page.is_visible("#nesting")


@pytest.mark.parametrize("place", ["#latents/2/prefix-1", "#latent=2&prefix=1"])
def test_a_link_to_a_latent_and_the_theme(browser: Any, report: Path, place: str) -> None:
    page = Opened(browser, report, place=place)
    assert page.selected() == 2
    assert page.page.is_checked("#prefix input[value='1']")
    page.page.evaluate("location.hash = '#latent=7'")
    page.page.get_by_role("heading", name="Latent 7", exact=True).wait_for()
    assert page.page.get_attribute("#detail a.button", "href") == "#latent=7"
    before = page.page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.page.click("#theme")
    assert page.page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    page.close()


@pytest.mark.parametrize("place", ["", "#overview/prefix-0", "#tab=overview"])
def test_the_page_opens_at_its_top(browser: Any, report: Path, place: str) -> None:
    """A place that is an element's id would be scrolled to once the page has loaded."""
    page = Opened(browser, report, height=300, place=place)
    page.page.wait_for_load_state("load")
    page.frame()
    assert page.page.evaluate("scrollY") == 0
    assert page.page.is_visible("h1")
    page.close()


def test_nothing_is_wider_than_a_phone(browser: Any, report: Path) -> None:
    opened = Opened(browser, report, width=360, height=740)
    page = opened.page
    for tab in ("overview", "nesting", "error", "about", "latents"):
        page.click(f"#tab-{tab}")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, tab
    assert page.is_hidden("#detail")
    page.locator(".row").first.click()
    assert page.is_visible("#detail h2")
    assert page.is_visible(".lines .focus >> nth=0")
    page.click(".back")
    assert page.is_hidden("#detail")
    opened.close()


def test_the_numbers_are_there_without_javascript(browser: Any, report: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"file://{report}")
    assert page.locator("#prefixes tbody tr").count() == len(ENDS)
    context.close()


def test_json_cannot_leave_its_element() -> None:
    text = script_json({"a": [*HOSTILE, "<!--", "</SCRIPT >"]})
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text)["a"][: len(HOSTILE)] == HOSTILE


def large_catalogue(n_latents: int, n_contexts: int, length: int) -> Catalogue:
    rng = np.random.default_rng(0)
    ends = (n_latents // 16, n_latents // 8 * 3 // 2, n_latents // 16 * 7, n_latents)
    per = 18
    latents = np.repeat(np.arange(n_latents, dtype=np.int32), per)
    shades = np.where(
        rng.random((len(latents), 2 * REACH + 1)) < 0.12, rng.random((len(latents), 2 * REACH + 1)), 0
    )
    quantiles = np.tile(np.r_[np.full(10, np.nan), np.linspace(0.95, 0.05, 8)], n_latents).astype(np.float32)
    places = rng.integers(0, n_contexts * length, len(latents))
    samples = Samples(
        latents, places, rng.random(len(latents)).astype(np.float32), quantiles, shades.astype(np.float16)
    )
    others = rng.integers(0, n_latents, (n_latents, 8))
    density = np.tile(10 ** rng.uniform(-5, -1, n_latents), (4, 1)).astype(np.float32)
    few = rng.random(n_latents)
    return Catalogue(
        group=np.searchsorted(ends, np.arange(n_latents), side="right"),
        density=density,
        firings=(density[-1] * 3e5).astype(np.int64) + 1,
        largest=1 + few.astype(np.float32),
        mean=few,
        energy=few / few.sum(),
        entropy=8 * few,
        top_share=few,
        tokens=rng.integers(0, 60, (n_latents, 5)).astype(np.int32),
        token_shares=rng.random((n_latents, 5)).astype(np.float32),
        histogram=rng.integers(0, 256, (n_latents, 24)),
        neighbours=Neighbours(torch.from_numpy(others), torch.rand(n_latents, 8)),
        twins=Partners(others[:, :4].astype(np.int32), rng.random((n_latents, 4)).astype(np.float32)),
        parents=Partners(
            (others[:, :4] % ends[0]).astype(np.int32), rng.random((n_latents, 4)).astype(np.float32)
        ),
        samples=samples,
        percentiles=np.sort(rng.random((n_latents, 100)).astype(np.float32)),
        effects=LogitEffects(
            rng.integers(0, 60, (n_latents, 10)).astype(np.int32),
            np.sort(rng.random((n_latents, 10)).astype(np.float32))[:, ::-1].copy(),
            rng.integers(0, 60, (n_latents, 10)).astype(np.int32),
            -np.sort(rng.random((n_latents, 10)).astype(np.float32))[:, ::-1].copy(),
            rng.integers(0, 9000, (n_latents, 32)).astype(np.int32),
            np.tile(np.array([-2, 3], np.float32), (n_latents, 1)),
            3 + rng.random(n_latents).astype(np.float32),
            0,
            Chance(3.5, 0.01),
        ),
        labels=Labels(
            np.ones((n_latents, 5), np.uint8),
            np.pad(rng.integers(0, 60, (n_latents, 5, 1)), ((0, 0), (0, 0), (0, 7)), constant_values=-1),
            rng.random((n_latents, 5)).astype(np.float32),
            rng.random((n_latents, 5)).astype(np.float32),
            np.full(n_latents, 200),
            np.ones(n_latents, bool),
            [],
        ),
        quality=Quality(
            1000, *rng.integers(1, 999, (2, n_latents)), *rng.random((3, n_latents)).astype(np.float32)
        ),
    )


@pytest.mark.slow
def test_18432_latents_are_fast(browser: Any, report: Path, tmp_path: Path) -> None:
    length, n_contexts = 1024, 300
    contexts = np.random.default_rng(1).integers(2, 70, (n_contexts, length)).astype(np.int32)
    text = TokenText(read_tokenizer(tokenizer_of(report)))
    data = page_data(large_catalogue(18_432, n_contexts, length), contexts, text)
    values = json.loads((report.parent / "metrics.json").read_text())
    values["prefixes"] += values["prefixes"][-1:]
    values["redundancy"]["prefixes"] += values["redundancy"]["prefixes"][-1:]
    for kind in ("by_token", "by_position", "by_size", "by_dimension"):
        for line in values["errors"][kind]:
            line["fvu"] += line["fvu"][-1:]
    metrics = Metrics.model_validate(values)
    data["prefix_ends"] = [1152, 3456, 8064, 18_432]
    page = tmp_path / "large.html"
    write_report(page, metrics, data, [], [], {})
    assert page.stat().st_size < 40e6
    started = time.monotonic()
    opened = Opened(browser, page, place="#latents")
    opened.page.wait_for_selector(".row")
    opened.page.wait_for_selector(".lines .focus")
    print(f"page {page.stat().st_size / 1e6:.1f} MB, first latent after {time.monotonic() - started:.2f} s")
    paint = opened.page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    assert paint < 2000
    gaps = opened.page.evaluate(
        """async () => { const list = document.getElementById('list'), gaps = []; let last = performance.now();
        for (let i = 0; i < 60; i++) { list.scrollTop += 3000; await new Promise(requestAnimationFrame);
        const now = performance.now(); gaps.push(now - last); last = now; } return gaps; }"""
    )
    assert np.median(gaps) < 50
    assert opened.page.locator(".row").count() < 60
    print(
        f"first paint {paint:.0f} ms, median frame while scrolling {np.median(gaps):.0f} ms, worst {max(gaps):.0f} ms"
    )
    opened.page.fill("#search", "word12")
    opened.frame()
    assert opened.ids()
    opened.close()


def tokenizer_of(report: Path) -> Path:
    root = report.parents[6]
    return next(root.glob("activations/*/*.zarr/tokenizer.json"))

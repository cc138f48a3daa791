"""prompt.html in headless Chromium: filters, layers, changes, hostile text, split characters, a phone, no network."""

from pathlib import Path
from typing import Any

import pytest

from evaluate.prompt.page import write_page
from evaluate.prompt.records import (
    VERSION,
    ActiveLatent,
    Candidate,
    ChangedLatent,
    NamedLatent,
    Prompt,
    PromptChange,
    PromptLayer,
    PromptToken,
    Shift,
)
from tests.evaluate.report.test_page import HOSTILE, Opened, browser

__all__ = ["browser"]
PIECES = ["<s>", "a", "", "", "🙂", *HOSTILE]


def token(i: int, text: str) -> PromptToken:
    return PromptToken(
        text=text, context=0, row=i > 0, next=text, next_given=i + 1 < len(PIECES), next_probability=0.25
    )


def layer(number: int, evaluated: bool) -> PromptLayer:
    """Latents 1 (prefix 0, dense), 7 and 9: activations 1,234, 2 and 1, effects 0.5, -3 and 0.01."""
    rows = len(PIECES) - 1
    known = {"density": 0.4, "label": (HOSTILE[0], "\n")} if evaluated else {}
    active = [
        ActiveLatent(latent=1, value=1234.4, effect=0.5),
        ActiveLatent(latent=7, value=2.0, effect=-3.0),
        ActiveLatent(latent=9, value=1.0, effect=0.01),
    ]
    return PromptLayer(
        layer=number,
        run="a",
        prefix_ends=[4, 16],
        error_share=[[0.75] * rows, [0.25] * rows],
        active=[active[:1] if i == 1 else active for i in range(rows)],
        output_effect=[-0.125] * rows,
        latents={
            1: NamedLatent(group=0, **known),  # pyright: ignore[reportArgumentType]
            7: NamedLatent(group=1, **(known | {"density": 0.02} if known else {})),  # pyright: ignore[reportArgumentType]
            9: NamedLatent(group=1, **known),  # pyright: ignore[reportArgumentType]
        },
    )


def shift(i: int) -> Shift:
    own = Candidate(token=HOSTILE[1], logit=(2.0, 1.0), probability=(0.75, 0.5))
    other = Candidate(token="b", logit=(1.0, 1234.0), probability=(0.25, 0.9 if i == 6 else 0.25))
    return Shift(kl=0.5 if i == 6 else 0.0, next=own, likeliest=[own, other])


def prompt(*layers: PromptLayer, changed: bool = False) -> Prompt:
    text = "".join(PIECES[1:])
    tokens = [token(i, piece) for i, piece in enumerate(PIECES)]
    common = {"version": VERSION, "model": HOSTILE[0], "text": text, "effects_skipped": None}
    if not changed:
        return Prompt(**common, tokens=tokens, layers=list(layers))  # pyright: ignore[reportArgumentType]
    changes = [
        ChangedLatent(layer=3, latent=7, how="ablate", value=None, token=None, rows=18, largest=-2.0),
        ChangedLatent(layer=3, latent=1, how="set", value=1234.5, token=6, rows=0, largest=0.0),
    ]
    change = PromptChange(
        changes=changes,
        tokens=[shift(i) for i in range(len(tokens))],
        continuation=(f" x{HOSTILE[0]}", " y\n"),
    )
    return Prompt(**common, tokens=tokens, layers=list(layers), intervention=change)  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Of two layers, one evaluated, with its report beside it; and of one layer with a change."""
    root = tmp_path_factory.mktemp("prompts")
    (root / 'l"3/evaluation').mkdir(parents=True)
    (root / 'l"3/evaluation/report.html').write_text("")
    plain, changed = root / "prompts/plain.html", root / "prompts/changed.html"
    evaluations = {3: root / 'l"3/evaluation'}
    write_page(plain, prompt(layer(3, True), layer(12, False)), evaluations)
    write_page(changed, prompt(layer(3, True), changed=True), evaluations)
    return plain, changed


def chips(opened: Opened, row: int = 0) -> list[str]:
    cells = opened.page.locator("#rows tr").nth(row).locator("td.latents").first
    return [text.split("\n")[0] for text in cells.locator("button b").all_inner_texts()]


def done(opened: Opened) -> None:
    assert opened.page.evaluate("window.hacked") is None
    opened.close()


def test_filters_and_layers(browser: Any, pages: tuple[Path, Path]) -> None:
    opened = Opened(browser, pages[0])
    page = opened.page
    assert chips(opened) == ["1", "7", "9"]
    first = page.locator("#rows tr").first.locator("td.latents button").first
    assert "1,234" in first.inner_text()  # not 1230
    assert "⏎" in first.inner_text()  # of its label
    assert "⏎\n⇥␍" in page.inner_text("#strip")
    assert "+0.5" in first.inner_text()
    assert (
        "−0.13" in page.locator("#rows tr").first.inner_text()
        or "−0.12" in page.locator("#rows tr").first.inner_text()
    )
    page.select_option("#order", "effect")
    assert chips(opened) == ["7", "1", "9"]
    page.fill("#most", "1")
    assert chips(opened) == ["7"]
    assert "+2" in page.locator("#rows tr").first.inner_text()
    page.fill("#most", "6")
    page.select_option("#limit", "0.05")
    assert chips(opened) == ["7"]
    page.select_option("#limit", "1")
    page.select_option("#prefix", "0")
    assert chips(opened) == ["1"]
    assert page.locator("#rows tr").first.locator(".bar-cell").first.inner_text() == "0.75"
    assert "Layer 12: this run was not evaluated" in page.inner_text("#unknown")
    assert page.locator("#titles th").count() == 2 + 2 * 3
    page.locator("#layers input").first.uncheck()
    assert page.locator("#titles th").count() == 2 + 3
    assert "layer 12" in page.inner_text("#titles")
    done(opened)


def test_a_latent_shades_the_text_and_leads_to_its_report(browser: Any, pages: tuple[Path, Path]) -> None:
    opened = Opened(browser, pages[0])
    page = opened.page
    page.locator("#rows tr").first.locator("td.latents button").nth(1).click()
    assert "Latent 7 of layer 3, group 1, fires on 2 % of the evaluated rows" in page.inner_text("#chosen")
    assert (
        page.locator("#chosen a").get_attribute("href")
        == "../l%223/evaluation/report.html#latents/7/prefix-1"
    )
    shaded = page.eval_on_selector_all(
        "#strip .t:not(.none)", "all => all.map((each) => Boolean(each.style.background))"
    )
    assert shaded[:2] == [True, True]  # "a", and the emoji, of whose parts one is without it
    page.locator("#rows tr").first.locator("td.latents").last.locator("button").first.click()
    assert "no label, because this layer was not evaluated" in page.inner_text("#chosen")
    assert page.locator("#chosen a").count() == 0
    assert [page.locator("#rows th.word").nth(i).inner_text() for i in (1, 2, 3)] == [
        "2🙂 1/3",
        "3🙂 2/3",
        "4🙂 3/3",
    ]
    done(opened)


def test_before_and_after(browser: Any, pages: tuple[Path, Path]) -> None:
    opened = Opened(browser, pages[1], width=400, height=800)
    page = opened.page
    asked = page.locator("#asked li").all_inner_texts()
    assert asked[0].startswith(
        "Latent 7 of layer 3 is ablated (set to 0) at every token; its activation changes on 18"
    )
    assert asked[1].endswith("its activation is the same already, so this changes nothing.")
    assert page.locator("#shifts tr").count() == len(PIECES)
    page.locator("#shifts tr").nth(6).click()
    assert page.inner_text("#at").startswith("After token 6")
    cells = page.locator("#candidates tr").nth(1).locator("td").all_inner_texts()
    assert cells == ["b", "1.00", "1234.00", "+1233.00", "25.0 %", "90.0 %"]
    likeliest = page.locator("#shifts tr").nth(6).locator("td.left").all_inner_texts()
    assert likeliest[1].startswith("b")
    assert "window.hacked" in page.inner_text("#continuations")
    assert page.evaluate("document.documentElement.scrollWidth") <= 400, "nothing is cut on a phone"
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    done(opened)

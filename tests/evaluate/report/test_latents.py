"""What is asked of the page's latents in headless Chromium: search, filters, notes, links, files; one prefix."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from common.errors import InputError
from evaluate.notes import Note, read_notes
from evaluate.report.report import NOTES, notes_json, renew_notes
from evaluate.run import evaluate
from tests.evaluate.fakes import random_coder
from tests.evaluate.report.test_page import VOCABULARY, Opened, browser, opened, report
from tests.evaluate.runs import D_IN, D_OUT, ENDS, make_run, settings_of

__all__ = ["browser", "opened", "report"]
LABELLED = Note(label="</script><b>", score=None, source="")


def test_the_training_stands_at_the_head(opened: Opened) -> None:
    said = opened.page.inner_text(".training").replace("\n", " ")
    for fact in ("k 4", "selection batch top-k", "groups 4 + 6 + 14", "seed 0", "weights of 20"):
        assert fact in said


def test_search_reads_whole_contexts_and_the_pane_follows(opened: Opened) -> None:
    """Every latent with the words in a context and no other; neighbouring texts of the pool do not count."""
    page = opened.page
    words, expected = page.evaluate(
        """() => {
        const tokens = (s) => Array.from(c.pool.subarray(c.sampleAt[s], c.sampleAt[s] + c.sampleLength[s]));
        const text = (some) => some.map((t) => strings[t]).join("");
        const words = text(tokens(9).slice(0, 2)), found = new Set();
        for (let f = 0; f < F; f++) for (let s = c.sampleBounds[f]; s < c.sampleBounds[f + 1]; s++)
          if (text(tokens(s)).includes(words)) found.add(f);
        return [words, [...found].sort((a, b) => a - b)]; }"""
    )
    page.fill("#search", words.upper())
    opened.frame()
    assert sorted(page.evaluate("order")) == expected
    assert opened.selected() == opened.ids()[0]
    first = page.locator(".lines").first
    assert all(words.strip() in text for text in first.locator("li p").all_text_contents())
    assert first.locator(".hit").first.is_visible()
    page.fill("#search", "nothing says this")
    opened.frame()
    assert page.locator("#detail h2").count() == 0


def test_filters_by_density_and_parent(opened: Opened) -> None:
    page = opened.page
    page.click("#more summary")
    shares = page.evaluate("Array.from({length: F}, (_, f) => density(f))")
    page.fill("#least", "20")
    page.fill("#most", "30")
    opened.frame()
    expected = [f for f, share in enumerate(shares) if 0.2 <= share <= 0.3]
    assert sorted(page.evaluate("order")) == expected
    assert 0 < len(expected) < ENDS[-1]
    page.click("#clear")
    page.evaluate("children[2] = [11, 17]")
    page.fill("#parent", "2")
    opened.frame()
    assert sorted(page.evaluate("order")) == [11, 17]
    assert opened.selected() in (11, 17)


def test_notes_and_stars_are_kept_saved_and_read_again(browser: Any, report: Path, tmp_path: Path) -> None:
    opened = Opened(browser, report, place="#latent=7")
    page = opened.page
    page.fill("#note", ' the "seventh",  =1+1 ')
    page.press("#note", "Enter")
    page.click("[aria-label='Next latent']")
    starred = opened.selected()
    page.keyboard.press("s")
    page.reload()
    page.wait_for_selector("[data-ready]", state="attached")
    assert page.get_attribute("#star", "aria-pressed") == "true"
    page.click("#more summary")
    page.check("#noted")
    assert opened.ids() == [7]
    with page.expect_download() as download:
        page.click("#save")
    path = tmp_path / download.value.suggested_filename
    download.value.save_as(path)
    seventh = Note(label='the "seventh", =1+1', score=None, source="page")
    assert path.name == "notes.csv"
    assert read_notes(path, 0, ENDS[-1]) == {7: seventh, starred: Note(label="", score=1.0, source="page")}
    opened.close()
    other = Opened(browser, report, place="#latent=7")
    assert other.page.input_value("#note") == ""
    other.page.set_input_files("#load", path)
    other.page.get_by_text("2 notes loaded.", exact=True).wait_for()
    assert other.page.input_value("#note") == 'the "seventh", =1+1'
    path.write_text("layer;latent;label\n0.0;7.0;of a frame with gaps;\n")  # as evaluate/notes.py takes it
    assert read_notes(path, 0, ENDS[-1])[7].label == "of a frame with gaps"
    other.page.set_input_files("#load", path)
    other.page.get_by_text("1 notes loaded.", exact=True).wait_for()
    path.write_text("layer;latent;label\n3;7;a\n")
    other.page.set_input_files("#load", path)
    other.page.get_by_text("notes.csv: line 2: layer: expected 0, this page's, found 3").wait_for()
    other.close()


def test_explanations_stand_beside_notes_and_are_not_saved_as_them(
    browser: Any, report: Path, tmp_path: Path
) -> None:
    before = report.read_bytes()
    said = Note(label="words </script> of one kind", score=0.8125, source="gpt-4")
    nothing, mine = Note(label="", score=None, source=""), Note(label="my own", score=None, source="page")
    latents = {7: nothing, 9: mine}
    renew_notes(report, {f: note.model_copy(update={"explanation": said}) for f, note in latents.items()})
    opened = Opened(browser, report, place="#latent=7")
    page = opened.page
    assert page.inner_text(".explanation") == "Explanation words </script> of one kind gpt-4, score 0.813"
    assert page.input_value("#note") == ""
    page.fill("#search", "of one kind")
    opened.frame()
    assert sorted(page.evaluate("order")) == [7, 9]
    assert page.inner_text("#row-9 .own-label") == "my own"
    assert page.inner_text("#row-9 .explained") == "words </script> of one kind"
    page.click("#more summary")
    page.check("#noted")
    assert sorted(page.evaluate("order")) == [7, 9]
    with page.expect_download() as download:
        page.click("#save")
    download.value.save_as(tmp_path / "notes.csv")
    assert read_notes(tmp_path / "notes.csv", 0, ENDS[-1]) == {9: mine}
    opened.close()
    report.write_bytes(before)


def test_a_browser_that_keeps_nothing_says_so(browser: Any, report: Path) -> None:
    context = browser.new_context()
    context.add_init_script(
        "Object.defineProperty(window, 'localStorage', { get() { throw new DOMException('no', 'SecurityError'); } });"
    )
    page = context.new_page()
    page.goto(f"file://{report}#latent=7")
    page.wait_for_selector("[data-ready]", state="attached")
    page.click("#star")
    assert "keeps no notes for this page (SecurityError)" in page.inner_text("#kept")
    assert page.is_enabled("#save")
    context.close()


def test_a_latent_downloads_as_json(opened: Opened) -> None:
    page = opened.page
    page.fill("#search", "7")
    opened.frame()
    with page.expect_download() as download:
        page.click("#detail button:text('JSON')")
    assert download.value.suggested_filename == "layer_0-latent_7.json"
    known = json.loads(Path(download.value.path()).read_text())
    assert (known["layer"], known["latent"], known["group"], len(known["density"])) == (0, 7, 1, len(ENDS))
    strongest = known["contexts"][0]
    assert strongest["activations"][strongest["focus"]] == pytest.approx(
        known["largest_activation"], rel=1e-5
    )
    assert len(strongest["tokens"]) == len(strongest["activations"])


def test_errors_are_sorted_by_fvu(opened: Opened) -> None:
    page = opened.page
    page.click("#tab-error")
    titles = page.eval_on_selector_all("#tokens thead th", "all => all.map(h => h.textContent)")
    at = titles.index("FVU, prefix 2")
    column = f"#tokens tbody tr > :nth-child({at + 1})"
    for order in (True, False):
        page.click(f"#tokens thead th:nth-child({at + 1}) button")
        values = page.eval_on_selector_all(column, "all => all.map(v => parseFloat(v.textContent))")
        assert values == sorted(values, reverse=order)
        assert len(set(values)) > 5


def test_the_numbers_of_a_column_have_their_decimals_under_each_other(opened: Opened) -> None:
    opened.page.click("#tab-overview")
    rows = opened.page.eval_on_selector_all(
        "#prefixes tbody tr", "rows => rows.map(r => [...r.cells].map(cell => cell.textContent))"
    )
    for column in list(zip(*rows, strict=True))[1:]:
        decimals = {len(cell.partition(".")[2]) for cell in column if cell != "–"}
        assert len(decimals) <= 1, column


def test_a_run_of_one_prefix_has_no_nesting(browser: Any, tmp_path: Path) -> None:
    make_run(tmp_path, random_coder(D_IN, D_OUT, (24,)), vocabulary=VOCABULARY)
    evaluate(settings_of(tmp_path), ce_tokens=0)
    opened = Opened(
        browser, settings_of(tmp_path).run_dir() / "evaluation" / "report.html", place="#latent=3"
    )
    page = opened.page
    assert page.locator("#tab-nesting, #nesting").count() == 0
    for tab in ("latents", "overview", "error", "about"):
        page.click(f"#tab-{tab}")
        text = page.evaluate(
            "[...document.querySelectorAll('svg')].forEach(e => e.remove()), document.body.innerText"
        )
        assert not re.search(r"prefix|parent|famil|group(?!_)|nest", text, re.IGNORECASE), (tab, text)
    opened.close()


def test_evaluating_again_puts_the_present_notes_into_the_page(report: Path) -> None:
    """And nothing else: what was measured stays."""
    folder, before = report.parent, report.read_bytes()
    root = folder.parents[5]
    said = folder.parent / "notes.csv"
    said.write_text("layer,latent,label\n0,7,</script><b>\n")
    _, fresh = evaluate(settings_of(root), ce_tokens=0)
    assert not fresh
    page = report.read_bytes()
    assert page == before.replace(NOTES[0] + b"{}", NOTES[0] + notes_json({7: LABELLED}).encode())
    assert page != before
    said.unlink()
    evaluate(settings_of(root), ce_tokens=0)
    assert report.read_bytes() == before
    assert not renew_notes(report, {})
    said.write_text("layer,latent,label\n1,7,a\n")
    with pytest.raises(InputError, match="line 2: layer: expected 0, the run's, found 1"):
        evaluate(settings_of(root), ce_tokens=0)
    said.unlink()


def test_words_that_begin_so_come_before_words_that_hold_it(opened: Opened) -> None:
    """ "Paris" found "comparisons" first, "by label", and contexts could not be left out."""
    page = opened.page
    cases = [("comparisons", 1), ("in paris", 2), ("paris", 2), ("(paris)", 2), ("épars", 0)]
    for text, expected in cases:
        assert page.evaluate("(text) => says(text, 'paris')", text) == expected, text
    assert page.evaluate("[says('a<script>', '<script>'), says('comparisons, paris', 'paris')]") == [2, 2]
    page.evaluate("setNote(3, 'comparisons', false); setNote(9, 'Paris', false); setNote(5, '', true)")
    page.fill("#search", "PARIS")
    opened.frame()
    assert page.evaluate("order") == [9, 3]
    said = page.inner_text("#count")
    assert said.endswith(": 1 by label, note or number, then 1 inside of other words")
    page.fill("#search", "word5")
    opened.frame()
    everywhere = page.evaluate("order")
    page.check("#labels")
    opened.frame()
    labelled = page.evaluate("Array.from({length: F}, (_, f) => f).filter((f) => labelSays(f, 'word5'))")
    assert sorted(page.evaluate("order")) == labelled
    assert 0 < len(labelled) < len(everywhere)
    assert everywhere[: len(labelled)] == page.evaluate("order")
    page.evaluate("[3, 9, 5].forEach((f) => setNote(f, '', false))")


def test_a_context_that_was_searched_for_shows_the_activation_on_the_words(opened: Opened) -> None:
    """It showed that of another token, the centre, which the context was chosen for."""
    page = opened.page
    f, s, at, level, words, focus = page.evaluate(
        """() => { for (let f = 0; f < F; f++) for (let s = c.sampleBounds[f]; s < c.sampleBounds[f + 1]; s++)
          for (let k = c.shadeBounds[s]; k < c.shadeBounds[s + 1]; k++)
            if (c.shadeAt[k] !== c.sampleFocus[s] && /^ word/.test(strings[c.pool[c.sampleAt[s] + c.shadeAt[k]]]))
              return [f, s, c.shadeAt[k], c.shadeLevel[k] / 255 * c.largest[f],
                      strings[c.pool[c.sampleAt[s] + c.shadeAt[k]]], c.sampleValue[s]]; }"""
    )
    on = "([f, s, at]) => activationAt(f, s, new Set([at]))"
    assert page.evaluate(on, [f, s, at]) == pytest.approx(level)
    assert page.evaluate("([f, s]) => activationAt(f, s, new Set([c.sampleFocus[s]]))", [f, s]) == focus
    assert page.evaluate(on, [f, s, 255]) == 0
    page.fill("#search", words)
    opened.frame()
    page.evaluate("choose", f)
    shown = page.eval_on_selector_all(
        ".lines:first-of-type .value", "all => all.map((each) => parseFloat(each.textContent))"
    )
    expected = page.evaluate(
        """(f) => { const own = []; for (let s = c.sampleBounds[f]; s < c.sampleBounds[f + 1]; s++)
          if (hasMatch(s) === BEGINS) own.push(activationAt(f, s, matched(s))); return own.sort((a, b) => b - a); }""",
        f,
    )
    assert level >= min(expected) - 1e-6
    assert shown[: len(expected)] == pytest.approx(expected, abs=0.006)


def test_a_share_of_few_rows_does_not_come_first(opened: Opened) -> None:
    """Wilson's lower bound: n / (n + z²) of n of n rows; half of many rows is above all of one."""
    page = opened.page
    assert page.evaluate("lowest(1, 3)") == pytest.approx(3 / (3 + 1.96**2))
    assert page.evaluate("lowest(0, 50)") == pytest.approx(0, abs=1e-12)
    assert page.evaluate("lowest(0.5, 100)") == pytest.approx(0.40383, abs=1e-5)
    for name, share, rows in (
        ("precision", "labelPrecision", "labelRows"),
        ("recall", "labelRecall", "labelFired"),
    ):
        page.select_option("#sort", f"{name} of its label")
        bounds = page.evaluate(f"order.map((f) => lowest(c.{share}[f], c.{rows}[f])).filter((x) => x >= 0)")
        assert len(bounds) > 3
        assert bounds == sorted(bounds, reverse=True)
    f = opened.ids()[0]
    said = page.inner_text(f"#row-{f} .value")
    assert said.endswith(f"of {page.evaluate('(f) => c.labelFired[f]', f)} firings")


def test_j_and_k_move_wherever_the_choice_was_made(opened: Opened) -> None:
    """After a choice of the order, of a prefix or of a tab they did nothing: the focus stayed there."""
    page = opened.page
    page.select_option("#sort", "number")
    for place in ("#sort", "#tab-latents", "#prefix input:checked"):
        page.focus(place)
        before = opened.selected()
        page.keyboard.press("j")
        ids = page.evaluate("order")
        assert opened.selected() == ids[ids.index(before) + 1], place
    page.focus("#sort")
    page.keyboard.press("k")
    assert opened.selected() == ids[ids.index(before)]
    page.focus("#search")
    page.keyboard.press("j")
    assert page.input_value("#search") == "j"


def test_firings_are_of_the_chosen_prefix_and_weak_labels_are_dimmed(opened: Opened) -> None:
    """The share was of the chosen prefix, the count beside it of the full dictionary."""
    page = opened.page
    whole = page.evaluate("Array.from({length: F}, (_, f) => Math.round(density(f, G - 1) * run.rows))")
    assert whole == page.evaluate("Array.from(c.firings)")
    f = page.evaluate(
        "Array.from({length: ends[0]}, (_, f) => f).find((f) => density(f, 0) !== density(f, G - 1))"
    )
    page.evaluate("(f) => { setPrefix(0); choose(f); }", f)
    count = page.evaluate("(f) => Math.round(c.density[f] * run.rows).toLocaleString('en')", f)
    assert f"{count}\nfirings, prefix 0" in page.inner_text("#detail .facts")
    page.evaluate("setPrefix(G - 1)")
    dim = page.eval_on_selector_all(
        ".row", "all => all.map((row) => [+row.dataset.f, Boolean(row.querySelector('.weak'))])"
    )
    recall = page.evaluate("Array.from(c.labelRecall, (x) => Number.isFinite(x) ? x : null)")
    assert {g for g, weak in dim if weak} == {g for g, _ in dim if recall[g] is not None and recall[g] < 0.25}


def test_no_column_is_cut_off_at_1400_pixels(browser: Any, report: Path) -> None:
    opened = Opened(browser, report, width=1400, height=900)
    assert opened.page.evaluate("$('prefixes').scrollWidth <= $('prefixes').parentNode.clientWidth")
    opened.close()

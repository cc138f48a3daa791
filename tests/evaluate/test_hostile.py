"""Names that somebody else chose are text in every page, words in the model card; a page loads nothing."""

import re
from dataclasses import replace

import pytest
from jinja2 import Environment

import evaluate.run
from common.settings import ROOT
from evaluate import compare
from evaluate.report import templates
from evaluate.report.card import card
from tests.evaluate.fakes import random_coder
from tests.evaluate.runs import make_run, settings_of
from train import samples_page
from transcoder import Transcoder

HOSTILE = (
    "</title><script>alert(1)</script><img src=https://e.x/a onerror=alert(1)>\n`|[x](javascript:alert(1))"
)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every page that is written, of a run, model, data set and rival with hostile names, and the model card."""
    root, patch = tmp_path_factory.mktemp("pages"), pytest.MonkeyPatch()
    make_run(root)
    settings = settings_of(root)
    folder, own = settings.run_dir(), Transcoder.load(settings.run_dir())
    prepare = evaluate.run.prepare

    def hostile(*arguments: object, **more: object) -> object:
        job = prepare(*arguments, **more)  # type: ignore[arg-type]
        names = dict.fromkeys(("run", "model", "dataset", "input_hook"), HOSTILE)
        return replace(job, provenance=job.provenance.model_copy(update=names))

    rival = root / "<script>alert(1)<" / "script><b onload=alert(1)>"
    random_coder(6, 5, (8,)).save(rival)
    with patch.context() as changed:
        changed.setattr("evaluate.run.prepare", hostile)
        metrics, _ = evaluate.run.evaluate(settings, ce_tokens=0)
        compare.compare(settings, [str(rival)])
    own.metadata.update(training={"rows": 1, "steps": 1}, git_commit=None)
    own.metadata["source"] |= {"model": HOSTILE, "revision": HOSTILE, "output_hook": HOSTILE}
    text = card(own, metrics, "hf://me/name")
    sample = {
        "value": 1.0,
        "context": 0,
        "position": 1,
        "before": HOSTILE,
        "token": HOSTILE,
        "after": HOSTILE,
    }
    rendered = samples_page.render([{"latent": 0, "group": 0, "samples": [sample]}])
    read = {
        name: (folder / name).read_text() for name in ("evaluation/report.html", "comparison/compare.html")
    }
    return read | {"samples": rendered, "card": text}


PAGES = ("evaluation/report.html", "comparison/compare.html", "samples")


@pytest.mark.parametrize("name", PAGES)
def test_names_are_text_in_a_page(pages: dict[str, str], name: str) -> None:
    page = pages[name]
    assert "alert(1)" in page
    without_data = re.sub(r'(?s)<script id="data".*?</script>', "", page)
    assert not re.search(r"<(script|img|b) ?[^>]*alert|<img src=https|<script>alert", without_data)
    assert page.count("<title>") == 1
    assert "&lt;script&gt;alert(1)" in page


@pytest.mark.parametrize("name", PAGES)
def test_a_page_asks_for_nothing_and_runs_its_own_script_only(pages: dict[str, str], name: str) -> None:
    page = pages[name]
    (policy,) = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]+)">', page)
    assert policy.startswith("default-src 'none';")
    assert "unsafe-eval" not in policy
    assert not re.search(r"script-src[^;]*(unsafe-inline|https?:|\*)", policy)
    assert page.index("Content-Security-Policy") < page.index("<script" if "<script" in page else "</style>")
    without_data = re.sub(r'(?s)<script id="data".*?</script>', "", page).replace("http://www.w3.org/", "")
    loaded = re.findall(
        r"(?:src|href|action|data)\s*=\s*[\"']?(?!#|data:)([^\"'\s>]+)",
        without_data.replace("&lt;img src=https://e.x/a", ""),
    )
    assert [url for url in loaded if ":" in url or url.startswith("//")] == []
    assert not re.search(r"@import|url\((?!#|data:|\"#)", without_data)


def test_names_are_words_in_the_model_card(pages: dict[str, str]) -> None:
    card = pages["card"]
    header, text = card.removeprefix("---\n").split("---\n", 1)
    assert "base_model" not in header
    assert "script" in text
    assert not re.search(r"<script|<img|\]\(", text)
    assert all(line.count("|") == 3 for line in text.splitlines() if line.startswith("| model |"))


def test_one_environment_always_escapes_and_the_other_writes_markdown() -> None:
    """No other file has one of its own; the card is Markdown, and has words only."""
    files = [
        path for package in ("evaluate", "train", "transcoder") for path in (ROOT / package).rglob("*.py")
    ]
    own = [path.name for path in files if f"{Environment.__name__}(" in path.read_text()]
    assert own == ["templates.py"]
    assert (templates.HTML.autoescape, templates.MARKDOWN.autoescape) == (True, False)
    markdown = [
        path.name for path in files if "markdown(" in path.read_text() and path.name != "templates.py"
    ]
    assert markdown == ["card.py"]
    assert str(templates.HTML.from_string("{{ x }}").render(x=HOSTILE)).startswith(
        "&lt;/title&gt;&lt;script&gt;"
    )

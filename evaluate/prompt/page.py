"""prompt.html: one self-contained page of a text, token by token."""

from pathlib import Path

from markupsafe import Markup

from common.files import write_whole
from evaluate.prompt.records import Prompt
from evaluate.report.page_data import script_json
from evaluate.report.templates import html


def write_page(path: Path, prompt: Prompt) -> None:
    """The template escapes every value; the script gets the record as JSON, and shows texts as text alone."""
    page = html(
        "prompt.html",
        "prompt.js",
        prompt=prompt,
        data=Markup(script_json(prompt.written())),
    )
    write_whole(path, page.encode("utf-8", "replace"))

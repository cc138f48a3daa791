"""prompt.html: one self-contained page of a text, token by token."""

import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from markupsafe import Markup

from common.files import write_whole
from evaluate.prompt.records import Prompt
from evaluate.report.page_data import script_json
from evaluate.report.templates import html


def write_page(path: Path, prompt: Prompt, evaluations: Mapping[int, Path]) -> None:
    """The template escapes every value; the script gets the record as JSON, and shows texts as text alone.

    `evaluations`: folder of each layer's evaluation of these weights; a latent is linked to its report there.
    """
    reports = {
        layer: quote(os.path.relpath(folder / "report.html", path.parent), safe="/")
        for layer, folder in evaluations.items()
    }
    page = html(
        "prompt.html",
        "prompt.js",
        prompt=prompt,
        data=Markup(script_json({"prompt": prompt.written(), "reports": reports})),
    )
    write_whole(path, page.encode("utf-8", "replace"))

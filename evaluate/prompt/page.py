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


def write_page(path: Path, prompt: Prompt, run_dirs: Mapping[int, Path]) -> None:
    """The template escapes every value; the script gets the record as JSON, and shows texts as text alone.

    `run_dirs`: of each layer's run; a latent is linked to its report where there is one.
    """
    reports = {
        layer: quote(os.path.relpath(report, path.parent), safe="/")
        for layer, run_dir in run_dirs.items()
        if (report := run_dir / "evaluation/report.html").is_file()
    }
    page = html(
        "prompt.html",
        "prompt.js",
        prompt=prompt,
        data=Markup(script_json({"prompt": prompt.written(), "reports": reports})),
    )
    write_whole(path, page.encode("utf-8", "replace"))

"""prompt.html: one self-contained page of a text, token by token."""

import base64
import hashlib
from pathlib import Path

from markupsafe import Markup

from common.files import write_whole
from evaluate.prompt.records import Prompt
from evaluate.report.page_data import script_json
from evaluate.report.templates import PAGE, html


def write_page(path: Path, prompt: Prompt) -> None:
    """The template escapes every value; the script gets the record as JSON, and shows texts as text alone."""
    script = (PAGE / "prompt.js").read_text(encoding="utf-8")
    page = html(
        "prompt.html",
        prompt=prompt,
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=Markup(script_json(prompt.written())),
    )
    write_whole(path, page.encode("utf-8", "replace"))

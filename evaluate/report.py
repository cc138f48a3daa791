"""report.html: one self-contained page, every value escaped by the template engine."""

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from evaluate.files import write_text
from evaluate.verdicts import verdicts


def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["number"] = number
    return made


def number(value: float | None, digits: int = 3) -> str:
    """A number for people: `digits` significant ones, thousands grouped, a dash for none."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.{digits}g}" if abs(value) < 1000 else f"{value:,.0f}"


def write_report(path: Path, metrics: dict[str, Any], plots: dict[str, Path]) -> None:
    """`plots`: caption -> PNG; they are embedded, so that the page is one file."""
    images = [(caption, base64.b64encode(png.read_bytes()).decode()) for caption, png in plots.items()]
    page = _environment().get_template("report.html")
    write_text(path, page.render(metrics=metrics, verdicts=verdicts(metrics), images=images))

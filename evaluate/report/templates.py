"""The two template environments: pages always escape HTML, the model card is Markdown and is given words only."""

import base64
import hashlib
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from common.numbers import number_or_dash
from evaluate.report.console import split_name

PAGE = Path(__file__).parent / "page"


def number(value: float | None, digits: int = 3) -> str:
    """A number for people: `digits` significant ones, thousands grouped, a dash for none."""
    small = isinstance(value, float) and abs(value) < 1000
    return number_or_dash(value, f",.{digits}g" if small else "," if isinstance(value, int) else ",.0f", "–")


def percent(value: float | None) -> str:
    """A share as a percentage."""
    return number(None if value is None else 100 * value)


def one_decimal(value: float | None) -> str:
    """A share as a percentage with one decimal, for columns of them."""
    return number_or_dash(None if value is None else 100 * value, ".1f", "–")


def visible(token: str) -> str:
    """A token with its white space made visible."""
    return token.replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍").replace(" ", "␣")


def _environment(escaped: bool) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(PAGE),
        autoescape=escaped,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=not escaped,
    )
    environment.filters |= {
        "number": number,
        "percent": percent,
        "one_decimal": one_decimal,
        "split_name": split_name,
        "visible": visible,
    }
    return environment


HTML = _environment(escaped=True)
"""Of pages: what a value holds is text."""
MARKDOWN = _environment(escaped=False)
"""Of the model card, whose values are cut down to words first (evaluate/report/card.py)."""


def html(name: str, *script_files: str, **values: object) -> str:
    """The page of a template, with the style sheet that all of them share, and its script if it has one."""
    style = Markup((PAGE / "report.css").read_text(encoding="utf-8"))
    if script_files:
        script = "".join((PAGE / each).read_text(encoding="utf-8") for each in ("elements.js", *script_files))
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        values |= {"script": Markup(script), "script_hash": digest}
    return HTML.get_template(name).render(style=style, **values)


def markdown(name: str, **values: object) -> str:
    """The text of a template; the caller answers for its values."""
    return MARKDOWN.get_template(name).render(**values)

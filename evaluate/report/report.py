"""report.html: one self-contained page that opens from disk; every value is escaped by the template engine."""

import base64
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from common.files import write_whole
from evaluate.metrics.coactivation import MIN_FIRINGS
from evaluate.metrics.contexts import N_EVEN
from evaluate.metrics.rows import BLOCK_ROWS
from evaluate.report.console import split_name
from evaluate.report.figures import Drawn
from evaluate.report.page_data import script_json
from evaluate.report.verdicts import verdicts

PAGE = Path(__file__).parent / "page"
TABS = ("Overview", "Latents", "Nesting", "Error", "About")
BASELINES = {
    "mean": "mean output",
    "linear": "best linear map (ridge)",
    "one_group": "one group, not nested",
}


def number(value: float | None, digits: int = 3) -> str:
    """A number for people: `digits` significant ones, thousands grouped, a dash for none."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.{digits}g}" if abs(value) < 1000 else f"{value:,.0f}"


def percent(value: float | None) -> str:
    """A share as a percentage."""
    return "–" if value is None else number(100 * value)


FILTERS = {"number": number, "percent": percent, "split_name": split_name}
"""What the templates of this package write numbers and names with."""


def visible(token: str) -> str:
    """A token with its white space made visible."""
    return token.replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍").replace(" ", "␣")


def write_report(path: Path, metrics: dict[str, Any], data: dict[str, Any], drawn: list[Drawn]) -> None:
    """`data`: what the page's script reads; `drawn`: the plots, whose SVG is our own."""
    environment = Environment(
        loader=FileSystemLoader(PAGE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= FILTERS | {"visible": visible}
    script = (PAGE / "report.js").read_text(encoding="utf-8")
    page = environment.get_template("report.html").render(
        metrics=metrics,
        provenance=metrics["provenance"],
        verdicts=[verdicts(metrics, g) for g in range(len(metrics["prefixes"]))],
        baseline_names=BASELINES,
        cross_entropy_note=cross_entropy_note(metrics["cross_entropy"]),
        figures=lambda part: _figures([each for each in drawn if each.plot.part == part]),
        tabs=TABS,
        n_even=N_EVEN,
        min_firings=MIN_FIRINGS,
        block_rows=BLOCK_ROWS,
        style=Markup((PAGE / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=Markup(script_json(data)),
    )
    write_whole(path, page.encode())


def cross_entropy_note(measured: dict[str, Any]) -> str:
    """One sentence on what was measured, or why nothing was."""
    if measured["skipped"] is not None:
        return f"Cross-entropy was not measured: {measured['skipped']}."
    return (
        f"Cross-entropy on {measured['positions']:,} tokens of the split's contexts, in nats per token: model as it "
        f"is {measured['clean']:.3f}, MLP output zeroed {measured['zero']:.3f}, "
        f"replaced by its mean {measured['mean']:.3f}."
    )


def _figures(drawn: list[Drawn]) -> Markup:
    figure = Markup(
        '<figure class="{}"><figcaption>{}</figcaption><div role="img" aria-label="{}">{}</div></figure>\n'
    )
    return Markup("").join(
        figure.format("wide" if each.wide else "", each.plot.caption, each.plot.caption, Markup(each.svg))
        for each in drawn
    )

"""report.html: one self-contained page that opens from disk; every value is escaped by the template engine."""

from pathlib import Path

from markupsafe import Markup

from common.files import write_whole
from evaluate.metrics.coactivation import MIN_FIRINGS
from evaluate.metrics.contexts import N_EVEN
from evaluate.metrics.rows import BLOCK_ROWS
from evaluate.records import AblationLosses, NotMeasured, Results
from evaluate.report.figures import Drawn
from evaluate.report.page_data import PageData, script_json
from evaluate.report.templates import html
from evaluate.report.verdicts import verdicts

TABS = ("Overview", "Latents", "Nesting", "Error", "About")
BASELINES = {
    "mean": "mean output",
    "linear": "best linear map (ridge)",
    "one_group": "one group, not nested",
}


def write_report(path: Path, results: Results, data: PageData, drawn: list[Drawn]) -> None:
    """`data`: what the page's script reads; `drawn`: the plots, whose SVG is our own."""
    page = html(
        "report.html",
        "report.js",
        metrics=results,
        provenance=results.provenance.written(),
        verdicts=[verdicts(results, g) for g in range(len(results.prefixes))],
        baselines=[(BASELINES[name], each) for name, each in results.baselines if each is not None],
        cross_entropy_note=cross_entropy_note(results.cross_entropy),
        figures=lambda part: elements([each for each in drawn if each.plot.part == part]),
        tabs=TABS,
        n_even=N_EVEN,
        min_firings=MIN_FIRINGS,
        block_rows=BLOCK_ROWS,
        data=Markup(script_json(data)),
    )
    write_whole(path, page.encode())


def cross_entropy_note(measured: AblationLosses | NotMeasured) -> str:
    """One sentence on what was measured, or why nothing was."""
    if isinstance(measured, NotMeasured):
        return f"Cross-entropy was not measured: {measured.skipped}."
    return (
        f"Cross-entropy on {measured.positions:,} tokens of the split's contexts, in nats per token: model as it "
        f"is {measured.clean:.3f}, MLP output zeroed {measured.zero:.3f}, "
        f"replaced by its mean {measured.mean:.3f}."
    )


def elements(drawn: list[Drawn]) -> Markup:
    """The plots as figures with their captions."""
    figure = Markup(
        '<figure class="{}"><figcaption>{}</figcaption><div role="img" aria-label="{}">{}</div>{}</figure>\n'
    )
    return Markup("").join(
        figure.format(
            "wide" if each.wide else "", each.plot.caption, each.plot.caption, Markup(each.svg), each.table
        )
        for each in drawn
    )

"""report.html: one self-contained page that opens from disk; every value is escaped by the template engine."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from common.files import write_whole
from evaluate.labels.measured import WEAK_RECALL
from evaluate.metrics.coactivation import MIN_FIRINGS
from evaluate.metrics.contexts import N_EVEN
from evaluate.metrics.rows import BLOCK_ROWS
from evaluate.notes import Note
from evaluate.records import AblationLosses, NotMeasured, Results
from evaluate.report.figures import Drawn
from evaluate.report.page_data import PageData, script_json
from evaluate.report.tables import error_columns, group_columns, prefix_columns
from evaluate.report.templates import html
from evaluate.report.verdicts import verdicts

TABS = ("Overview", "Latents", "Nesting", "Error", "About")
BASELINES = {
    "mean": "mean output",
    "linear": "best linear map (ridge)",
    "one_group": "one group, not nested",
}


SCRIPTS = ("report_notes.js", "report_text.js", "report.js")
NOTES = b'<script type="application/json" id="notes">', b"</script>"
"""What stands before and after the notes in the page."""


def write_report(
    path: Path,
    results: Results,
    data: PageData,
    drawn: list[Drawn],
    training: Sequence[tuple[str, str]],
    notes: Mapping[int, Note],
) -> None:
    """`data`: what the page's script reads; `drawn`: the plots, whose SVG is our own; `training`: name and value."""
    nested, provenance = len(results.prefixes) > 1, results.provenance.written()
    parts = ("overview", "nesting", "error")
    shown = {part: [each for each in drawn if each.plot.part == part] for part in parts}
    if not nested:  # one bar, and one share of one
        shown["overview"] = [each for each in shown["overview"] if each.plot.name != "fvu"]
    baselines = [(BASELINES[name], each) for name, each in results.baselines if each is not None]
    page = html(
        "report.html",
        *SCRIPTS,
        metrics=results,
        provenance={key: value for key, value in provenance.items() if nested or key != "one_group_sha256"},
        training=training,
        nested=nested,
        verdicts=[verdicts(results, g) for g in range(len(results.prefixes))],
        baselines=[name for name, _ in baselines],
        prefix_columns=prefix_columns(results, [each for _, each in baselines]),
        group_columns=group_columns(results),
        error_columns=error_columns(results),
        cross_entropy_note=cross_entropy_note(results.cross_entropy),
        figures=lambda part: elements(shown[part]),
        tabs=[tab for tab in TABS if nested or tab != "Nesting"],
        n_even=N_EVEN,
        min_firings=MIN_FIRINGS,
        block_rows=BLOCK_ROWS,
        weak_recall=WEAK_RECALL,
        data=Markup(script_json(data)),
        notes=Markup(notes_json(notes)),
    )
    write_whole(path, page.encode())


def notes_json(notes: Mapping[int, Note]) -> str:
    """As the page's script reads them: latent -> label, score, source, and an explanation beside a note.

    An explanation alone stands as a note that is marked: pages of before explanations show it as one.
    """
    return script_json({str(latent): _for_page(note) for latent, note in notes.items()})


def _for_page(note: Note) -> dict[str, object]:
    own: dict[str, object] = {"label": note.label, "score": note.score, "source": note.source}
    if note.explanation is None:
        return own
    explained = _for_page(note.explanation)
    alone = not note.label and note.score is None
    return explained | {"explained": True} if alone else own | {"explained": explained}


def renew_notes(path: Path, notes: Mapping[int, Note]) -> bool:
    """Put the notes into a page that is there, in place of those it was written with; whether they differ."""
    page = path.read_bytes()
    start = page.rindex(NOTES[0]) + len(NOTES[0])
    stop, own = page.index(NOTES[1], start), notes_json(notes).encode()
    if page[start:stop] == own:
        return False
    write_whole(path, page[:start] + own + page[stop:])
    return True


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

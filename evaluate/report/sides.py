"""A run's evaluations side by side: what changes on train rows, on another text, and how much of it is noise.

The columns are in every page of the run's evaluations between two marks, and are put there anew when one is added.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markupsafe import Markup

from common.files import write_whole
from common.numbers import number_or_dash
from evaluate.files import Asked, Done, latents_of
from evaluate.kept.evaluations import Evaluation, There, of_weights
from evaluate.notes import Note
from evaluate.records import PrefixMetrics
from evaluate.report.console import increase, split_name
from evaluate.report.report import renew_notes
from evaluate.report.templates import HTML

START, STOP = b"<!-- sides -->", b"<!-- /sides -->"
PAGE = "report.html"
LEAST_FIRINGS = 32
"""Expected on both sides, for a latent whose density is compared: twice as many is 2.8 standard deviations then."""


@dataclass(frozen=True)
class Side:
    """One column."""

    name: str
    evaluation: Evaluation
    density: np.ndarray
    """[G, F] share of the rows on which each latent fires, by each prefix's threshold."""

    @property
    def rows(self) -> int:
        return self.evaluation.metrics.rows

    def prefix(self, g: int) -> PrefixMetrics:
        return self.evaluation.metrics.prefixes[g]


def sides(there: There, weights_sha256: str) -> list[Side]:
    """The evaluations of these weights, one for each text and split, the main one first: of several the largest."""
    largest: dict[tuple[str, str], Evaluation] = {}
    for each in of_weights(there, weights_sha256):
        of = each.metrics.provenance
        key = of.store_fingerprint, of.split
        largest[key] = max(largest.get(key, each), each, key=lambda one: one.size)
    names = [_name(each) for each in largest.values()]
    return [
        Side(
            name + f" ({each.metrics.provenance.store_fingerprint[:8]})" * (names.count(name) > 1),
            each,
            latents_of(each.folder, "density")[0],
        )
        for name, each in zip(names, largest.values(), strict=True)
    ]


def _name(evaluation: Evaluation) -> str:
    """The split; of another store than the run was trained on, with its text."""
    of = evaluation.metrics.provenance
    split = split_name(of.split)
    return split if of.trained_on_this_store is not False else f"{of.dataset}, {split}"


@dataclass(frozen=True)
class Line:
    """One number of one prefix: as it is on each side, and its difference to the first side; none there."""

    name: str
    title: str
    g: int
    cells: Sequence[tuple[str, str | None]]


Number = Callable[[Side, int], float | None]

NUMBERS: list[tuple[str, str, Number, str]] = [
    ("FVU", "fraction of variance unexplained", lambda side, g: side.prefix(g).fvu, ".3f"),
    ("L0", "active latents per row, mean", lambda side, g: side.prefix(g).l0, ".1f"),
    (
        "dead %",
        "latents that never fire on these rows",
        lambda side, g: 100 * side.prefix(g).dead_fraction,
        ".1f",
    ),
    (
        "density %",
        "share of the rows on which a living latent fires, median",
        lambda side, g: median_density(side.density[g]),
        ".3f",
    ),
    (
        "CE increase",
        "nats per token ± standard error over contexts",
        lambda side, g: _increase(side, g),
        "+.3f",
    ),
    ("CE recovered %", "against zeroing the MLP's output", lambda side, g: _recovered(side, g), ".1f"),
]
"""Name, what it is, value, format."""
MOVED = "moved %"
MOVED_TITLE = (
    "latents that fire at least twice, or at most half, as often as in the first column; of those with "
    f"{LEAST_FIRINGS} firings expected in both"
)


def lines(shown: Sequence[Side]) -> list[Line]:
    """Every number of every prefix, on each side."""
    first, n_prefixes = shown[0], len(shown[0].evaluation.metrics.prefixes)
    found: list[Line] = []
    for name, title, number, spec in NUMBERS:
        for g in range(n_prefixes):
            values = [number(side, g) for side in shown]
            if any(value is not None for value in values):
                texts = [_text(side, g, name, value, spec) for side, value in zip(shown, values, strict=True)]
                found.append(Line(name, title, g, [*zip(texts, _differences(values, spec), strict=True)]))
    for g in range(n_prefixes):
        shares = [moved(first.density[g], each.density[g], first.rows, each.rows) for each in shown[1:]]
        found.append(
            Line(MOVED, MOVED_TITLE, g, [("–", None), *((_percent(share), None) for share in shares)])
        )
    return found


def _text(side: Side, g: int, name: str, value: float | None, spec: str) -> str:
    if name == "CE increase":
        found = increase(side.prefix(g).cross_entropy, "–")
        return found if isinstance(found, str) else found.text()
    return number_or_dash(value, spec, "–")


def _differences(values: Sequence[float | None], spec: str) -> list[str | None]:
    signed = spec if spec.startswith("+") else f"+{spec}"
    first, *others = values
    return [
        None,
        *(None if first is None or each is None else format(each - first, signed) for each in others),
    ]


def _increase(side: Side, g: int) -> float | None:
    language = side.prefix(g).cross_entropy
    return language and language.increase


def _recovered(side: Side, g: int) -> float | None:
    language = side.prefix(g).cross_entropy
    return None if language is None or language.recovered_zero is None else 100 * language.recovered_zero


def median_density(density: np.ndarray) -> float | None:
    """Per cent of the rows, of the median latent of those that fire."""
    alive = density[density > 0]
    return 100 * float(np.median(alive)) if alive.size else None


def moved(before: np.ndarray, after: np.ndarray, rows: int, others: int) -> float | None:
    """Share of the latents whose density is at least double or at most half of `before`; none where none is told apart.

    `rows`, `others`: of which these are the shares. A latent counts if LEAST_FIRINGS are expected on both sides.
    """
    pooled = (before * rows + after * others) / (rows + others)
    enough = pooled * min(rows, others) >= LEAST_FIRINGS
    if not enough.any():
        return None
    a, b = before[enough], after[enough]
    return float(((b >= 2 * a) | (2 * b <= a)).mean())


def _percent(share: float | None) -> str:
    return number_or_dash(None if share is None else 100 * share, ".1f", "–")


def changed_pages(there: There, weights_sha256: str) -> dict[Path, bytes]:
    """The pages of these weights' evaluations whose columns are not those of now, as they should be."""
    shown = sides(there, weights_sha256)
    table = lines(shown) if len(shown) > 1 else []
    changed: dict[Path, bytes] = {}
    for each in of_weights(there, weights_sha256):
        path = each.folder / PAGE
        page = path.read_bytes()
        if START not in page:
            continue
        start, stop = page.index(START) + len(START), page.index(STOP)
        own = _section(shown, table, each.folder).encode() if table else b""
        if page[start:stop] != own:
            changed[path] = page[:start] + own + page[stop:]
    return changed


def show_beside(there: There) -> None:
    """Write the columns into every page that lacks them; the caller holds the run's lock.

    Of all weights: an evaluation of the present ones may have taken the place of one beside an older page.
    """
    known = (Done.model_validate(values).provenance or Asked() for _, values in there)
    for weights in {of.weights_sha256 for of in known}:
        for path, page in changed_pages(there, weights).items():
            write_whole(path, page)


def show_notes(there: There, weights_sha256: str, notes: Mapping[int, Note]) -> None:
    """In the pages of all evaluations of these weights: notes are of the latents, whichever rows were measured."""
    for each in of_weights(there, weights_sha256):
        renew_notes(each.folder / PAGE, notes)


def _section(shown: Sequence[Side], table: Sequence[Line], folder: Path) -> Markup:
    links = [Path(os.path.relpath(side.evaluation.folder / PAGE, folder)).as_posix() for side in shown]
    columns = [
        (side, link if side.evaluation.folder != folder else None)
        for side, link in zip(shown, links, strict=True)
    ]
    n_prefixes = len(shown[0].evaluation.metrics.prefixes)
    return Markup(HTML.get_template("sides.html").render(columns=columns, lines=table, n_prefixes=n_prefixes))

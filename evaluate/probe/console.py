"""The probes in the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from common.tokens import printable
from evaluate.report.console import plain, rows_of, table_of

if TYPE_CHECKING:  # --help does not wait for the records
    from evaluate.probe.records import ClassProbes, FamilyProbes, Probes, SparseProbe

K = 5
"""Latents of the probes by which prefixes are compared."""
POINTS = 0.05
"""Accuracy below that of the dense probe on the raw outputs, up to which a probe is counted as near it."""
TOLD, LONGEST = 26, 40
"""Classes that are listed, and characters of each."""
HOW = {
    "text": "reading the text again",
    "separators": "the tokens that separate them",
    "stretches": "cutting the text into stretches, as it does not say where they end",
}


def percent(accuracy: float, error: float) -> str:
    """An accuracy and its standard error in per cent.

    >>> percent(0.9183, 0.0061)
    '91.8 ± 0.6'
    """
    return f"{100 * accuracy:.1f} ± {100 * error:.1f}"


def name_of(family: FamilyProbes) -> str:
    """A question, and over how many classes it is a mean."""
    return family.family if family.classes == 1 else f"{family.family} ({family.classes})"


def show(probes: Probes, path: Path, fresh: bool, console: Console) -> None:
    """Accuracies of every question, what was left out, and where they are."""
    of = probes.provenance
    ends = [prefix.end for prefix in probes.families[0].prefixes]
    table = table_of(
        f"{rows_of(of.rows, of.split)}, tested on {probes.test_documents:,} documents: accuracy in %",
        ("question", "inputs", "outputs", *(f"k = {k}" for k in _ks(probes)), f"random {K}"),
    )
    for family in probes.families:
        table.add_row(*_cells(family))
    console.print(table)
    if len(ends) > 1:
        by_prefix = table_of(f"k = {K} latents of each prefix", ("question", *(f"{end:,}" for end in ends)))
        for family in probes.families:
            found = [of_k(family, g) for g in range(len(ends))]
            by_prefix.add_row(name_of(family), *(percent(each.accuracy, each.error) for each in found))
        console.print(by_prefix)
    for line in lines(probes):
        plain(console, line)
    if not fresh:
        plain(console, "nothing has changed since the last probes: nothing was measured again")
    plain(console, f"probes {path}")


def lines(probes: Probes) -> Iterator[str]:
    """What the tables say in sum, and what they leave out."""
    near = [sum(_near(each) for each in of) for of in (probes.families, probes.classes)]
    yield (
        f"{K} latents are within {100 * POINTS:.0f} points of the raw outputs in {near[0]} of {len(probes.families)} "
        f"questions, {near[1]} of {len(probes.classes)} classes"
    )
    yield f"fitted on {probes.train_documents:,} other documents, found by {HOW[probes.provenance.documents]}"
    few: dict[str, list[str]] = {}
    for each in probes.left_out:
        if each.name:
            few.setdefault(each.family, []).append(each.name)
        elif each.family == "source":
            yield f"source was not asked: {each.why}"
        else:
            few.setdefault(each.family, [])
    if few:
        yield "left out, too few rows: " + "; ".join(
            f"{family} {_told(names)}".strip() for family, names in few.items()
        )


def _told(names: Sequence[str]) -> str:
    """The first ones: labels may be whole texts, and one of each document."""
    short = [
        name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…" for name in map(printable, names[:TOLD])
    ]
    return " ".join(short) + (f" and {len(names) - TOLD:,} more" if len(names) > TOLD else "")


def table_lines(probes: Probes) -> list[dict[str, str]]:
    """What the table of several layers says of one."""
    heads = ("question", "inputs", "outputs", *(f"k = {k}" for k in _ks(probes)), f"random {K}")
    return [dict(zip(heads, _cells(family), strict=True)) for family in probes.families]


def _cells(family: FamilyProbes) -> list[str]:
    full, random = family.prefixes[-1].sparse, of_k(family, -1)
    return [
        name_of(family),
        *(percent(each.accuracy, each.error) for each in (family.inputs, family.outputs, *full)),
        percent(random.random, random.random_error),
    ]


def _ks(probes: Probes) -> list[int]:
    return [each.k for each in probes.families[0].prefixes[-1].sparse]


def of_k(of: FamilyProbes | ClassProbes, g: int) -> SparseProbe:
    """The probe on K latents of prefix `g`."""
    return next(each for each in of.prefixes[g].sparse if each.k == K)


def _near(of: FamilyProbes | ClassProbes) -> bool:
    return of_k(of, -1).below_outputs <= POINTS

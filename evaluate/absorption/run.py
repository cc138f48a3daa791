"""absorption.json of a run, in a straight line: store and transcoders in, the record and a table out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from common.device import pick_device
from common.errors import InputError
from common.files import sha256
from common.numbers import number_or_dash
from common.settings import Settings
from evaluate.absorption import FILE
from evaluate.absorption.directions import (
    ENOUGH,
    LEAST_FITTED,
    LEAST_MEASURED,
    LEAST_WORDS,
    Class,
    classes,
)
from evaluate.absorption.measure import difference, estimate, of_transcoder, passed, stability
from evaluate.absorption.records import Absorption, Estimate, ToldClass
from evaluate.absorption.sample import Sample, sample
from evaluate.compare import chosen, distinct_names, holds_all, provenance_of_all
from evaluate.comparison.records import ComparisonProvenance
from evaluate.files import write_record
from evaluate.report.console import plain, rows_of, table_of
from evaluate.run import prepare
from evaluate.subject import read
from shards import Store
from train.sweep import keep_earlier
from transcoder import Transcoder
from transcoder.formats import weights_file

FEW = 10
"""Classes that count, below which the terminal says that they are few."""
LOW_F1 = 0.5
"""Of the main latents, mean over the classes, below which the terminal says what that means."""
VERSION = 1
"""Of absorption.json: raised with every change of what is measured."""


def absorption(settings: Settings, others: Sequence[str]) -> tuple[Absorption, Path]:
    """Measures the run that `settings` name and the `others` (see `evaluate.compare.chosen`).

    Writes absorption/absorption.json into the run's directory; returns its values and its path. Raises `InputError` for
    a store without train rows, and whatever `compare` refuses.
    """
    if settings.evaluate.split != "heldout":
        raise InputError(
            "evaluate.split: expected heldout, as absorption is measured on other documents than probes are fitted on, "
            f"found {settings.evaluate.split}"
        )
    job = prepare(settings, ce_tokens=0)
    job.store.train.refuse_removed()
    paths = [job.run_dir, *(chosen(settings.run_dir(), others) if others else [])]
    places = dict(zip(distinct_names(paths), paths, strict=True))
    device, mismatch = pick_device(settings.model.device), settings.evaluate.allow_mismatch
    coders = {name: read(path, job.store, mismatch).to(device) for name, path in places.items()}
    digests = {name: sha256(weights_file(path)) for name, path in places.items()}
    found = measured(job.store, job.n_rows, coders, provenance_of_all(job.provenance, digests))
    file = job.run_dir / FILE
    file.parent.mkdir(exist_ok=True)
    if file.exists() and not holds_all(found.provenance, found.rows, file):
        keep_earlier(file.parent, file.name)
    write_record(file, found)
    return found, file


def measured(
    store: Store, n_rows: int, coders: Mapping[str, Transcoder], provenance: ComparisonProvenance
) -> Absorption:
    """All of the record; the first of the transcoders is the run, the others stand beside it."""
    held = passed(coders, store.heldout, n_rows)
    rows = sample(store, n_rows)
    told = classes(rows)
    lines = [of_transcoder(name, coder, told, rows, held[name]) for name, coder in coders.items()]
    run, *others = coders
    return Absorption(
        version=VERSION,
        rows=n_rows,
        classes=[_told(each, rows) for each in told],
        transcoders=lines,
        differences=[difference(line, lines[0]) for line in lines[1:]],
        stability=[stability(coders[run], held[run], each, coders[each], held[each]) for each in others],
        provenance=provenance,
    )


def _told(each: Class, rows: Sample) -> ToldClass:
    own = (each.task.labels == 1) & rows.apart
    return ToldClass(
        family=each.task.family,
        name=each.task.name,
        rows=int(own.sum()),
        words=len(set(rows.word[own].tolist())),
        inputs=estimate(each.inputs),
        outputs=estimate(each.outputs),
        used=each.used,
        found=len(each.found),
    )


def show(found: Absorption, file: Path, console: Console) -> None:
    """A line for each transcoder and prefix; what differs from the run; stability; which classes count."""
    used = [each for each in found.classes if each.used]
    columns = ("transcoder", "latents", "FVU", "L0", "absorbed %", "fraction %", "silent %", "split", "F1")
    title = f"{len(used)} classes of tokens; FVU and L0 on {rows_of(found.rows, found.provenance.split)}"
    table = table_of(title, columns)
    for line in found.transcoders:
        for prefix in line.prefixes:
            shares = (_percent(each) for each in (prefix.absorbed, prefix.fraction, prefix.silent))
            rest = (_estimate(prefix.latents, 2), _estimate(prefix.f1, 3))
            numbers = (f"{prefix.end:,}", number_or_dash(prefix.fvu), f"{prefix.l0:.1f}", *shares, *rest)
            table.add_row(line.transcoder, *numbers)
    for each in found.differences:
        shares = (_percent(one, "+") for one in (each.absorbed, each.fraction, each.silent))
        rest = (_estimate(each.latents, 2, "+"), _estimate(each.f1, 3, "+"))
        table.add_row(
            f"{each.other}, minus {found.transcoders[0].transcoder}",
            "",
            number_or_dash(each.fvu, "+.3f"),
            "",
            *shares,
            *rest,
        )
    table.caption = "means ± standard errors over classes, not over seeds; split: main latents per class"
    console.print(table)
    if found.stability:
        table = table_of(
            "latents found again in the other transcoder", ("other", "group", "firing", "found again %")
        )
        for each in found.stability:
            for group in each.groups:
                table.add_row(each.other, str(group.group), f"{group.firing:,}", _percent(group.partnered))
            firing = sum(group.firing for group in each.groups)
            table.add_row(each.other, "all", f"{firing:,}", _percent(each.partnered))
        console.print(table)
    if not found.classes:
        plain(
            console,
            f"no class has enough rows: {LEAST_FITTED} to fit probes on, and {LEAST_MEASURED} held-out ones on "
            f"{LEAST_WORDS} other words; harvest more text",
        )
    if 0 < len(used) < FEW:
        plain(console, f"only {len(used)} classes count, so a single one can decide a difference")
    f1 = found.transcoders[0].prefixes[-1].f1
    if f1 is not None and f1.value < LOW_F1:
        plain(
            console,
            f"F1 {f1.value:.2f}: most of these classes have no latents of their own, so absorbed % says little "
            "(docs/absorption.md)",
        )
    for said, each in (
        ("that count (both probes are right on at least", True),
        ("left out (a probe is right on less than", False),
    ):
        names = [f"{one.family} {one.name}".strip() for one in found.classes if one.used == each]
        plain(console, f"classes {said} {ENOUGH:.0%} of rows on unseen words): {', '.join(names) or 'none'}")
    plain(console, f"written {file}")


def _percent(each: Estimate | None, sign: str = "") -> str:
    if each is None:
        return "-"
    error = "" if each.error is None else f" ± {100 * each.error:.1f}"
    return f"{100 * each.value:{sign}.1f}{error}"


def _estimate(each: Estimate | None, decimals: int, sign: str = "") -> str:
    if each is None:
        return "-"
    error = "" if each.error is None else f" ± {each.error:.{decimals}f}"
    return f"{each.value:{sign}.{decimals}f}{error}"

"""python -m evaluate.compare: several transcoders on the same held-out rows, one table with differences."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console

from common.cli import parser, read, run_stage
from common.errors import InputError
from common.layers.driver import add_spread, over_layers
from common.numbers import MARK, number_or_dash
from common.settings import Settings
from common.terminal.table import console
from evaluate.comparison.records import ComparedPrefix, ComparedTranscoder, Comparison, ComparisonProvenance
from evaluate.records import AblationLosses, LanguageMetrics, Provenance
from evaluate.report.console import plain, rows_of, table_of
from train.sweep import RESULTS, keep_earlier
from transcoder.layers import n_layers

if TYPE_CHECKING:  # with torch, which --help need not wait for
    from evaluate.metrics.side_by_side import Measured


def compare(settings: Settings, others: Sequence[str]) -> tuple[Comparison, Path]:
    """Measures the run that `settings` name and the `others` (see `chosen`) on the same rows.

    Writes compare.json, compare.png and compare.html into <run>/comparison, and keeps what was there in its folder
    `earlier` if it has other transcoders or rows; returns the values and the folder. Differences are to the run's
    full dictionary.
    """
    from common.device import pick_device  # these import torch, which --help need not wait for
    from common.files import sha256
    from evaluate.metrics.side_by_side import equal_l0, line_of, side_by_side
    from evaluate.run import baselines_for, prepare
    from evaluate.subject import read
    from transcoder.formats import weights_file
    from transcoder.heavy import typical_rows

    refuse_none(others)
    job = prepare(settings, ce_tokens=0)
    paths = [job.run_dir, *chosen(settings.run_dir(), others)]
    places = dict(zip(distinct_names(paths), paths, strict=True))
    device = pick_device(settings.model.device)
    mismatch = settings.evaluate.allow_mismatch
    coders = {name: read(path, job.store, mismatch).to(device) for name, path in places.items()}
    digests = {name: sha256(weights_file(path)) for name, path in places.items()}
    evaluated = {name: _evaluation(path, digests[name], job.provenance) for name, path in places.items()}
    moments = job.store.manifest.splits[settings.evaluate.split].outputs
    assert moments is not None, "prepare has refused a split without rows"
    typical = typical_rows(job.split, moments)
    measured, linear, heavy = side_by_side(coders, job.split, job.n_rows, baselines_for(job), typical)
    measured = [_with_language(each, evaluated[each.transcoder]) for each in measured]
    run, *rest = ([each for each in measured if each.transcoder == name] for name in coders)
    known = {name: known_settings(coder.metadata, coder.prefix_ends) for name, coder in coders.items()}
    folder = job.run_dir / "comparison"
    comparison = Comparison(
        rows=job.n_rows,
        lines=[line_of(each, run) for each in measured],
        equal_l0=[each for other in rest for each in equal_l0(run, other)],
        transcoders=[
            ComparedTranscoder(
                transcoder=name,
                report=each and Path(os.path.relpath(each.folder / "report.html", folder)).as_posix(),
                cross_entropy=each and each.losses,
                known_settings=known[name] is not None,
            )
            for name, each in evaluated.items()
        ],
        differing_settings=differing(known),
        linear_map_fvu=linear,
        heavy_rows=heavy,
        provenance=provenance_of_all(job.provenance, digests),
    )
    _write(folder, comparison)
    return comparison, folder


def refuse_none(others: Sequence[str]) -> None:
    """Raise `InputError` where nothing is to be compared with."""
    if not others:
        raise InputError('with: expected other transcoders; give WITH="<run> <dir>" (--with <run> <dir>)')


class Evaluated(NamedTuple):
    """An evaluation of one of the transcoders, where it is a run of ours."""

    folder: Path
    losses: AblationLosses | None
    """None where it has no cross-entropy on the rows' split and store."""
    language: list[LanguageMetrics | None]
    """Of each prefix, beside `losses`."""


def _evaluation(path: Path, digest: str, of: Provenance) -> Evaluated | None:
    """An evaluation of just these weights, with the cross-entropy on this split of this store if there is one.

    One that cannot be read is reported on standard error and ignored.
    """
    from evaluate.files import finished
    from evaluate.kept.evaluations import folders

    run_dir, found = path if path.is_dir() else path.parent, None
    for folder in folders(run_dir):
        try:
            metrics = finished(folder)
        except InputError as error:
            print(f"left out, report and cross-entropy: {error}", file=sys.stderr)
            continue
        if metrics is None or metrics.provenance.weights_sha256 != digest:
            continue
        own, losses = metrics.provenance, metrics.cross_entropy
        here = (own.split, own.store_fingerprint) == (of.split, of.store_fingerprint)
        if here and isinstance(losses, AblationLosses):
            return Evaluated(folder, losses, [prefix.cross_entropy for prefix in metrics.prefixes])
        found = found or Evaluated(folder, None, [])
    return found


def _with_language(each: Measured, evaluated: Evaluated | None) -> Measured:
    """A prefix with the cross-entropy that its evaluation has."""
    if evaluated is None or evaluated.losses is None:
        return each
    language = {"cross_entropy": evaluated.language[each.prefix]}
    return each._replace(metrics=each.metrics.model_copy(update=language), losses=evaluated.losses)


def known_settings(metadata: Mapping[str, Any], ends: Sequence[int]) -> dict[str, Any] | None:
    """Setting -> value, of all that a transcoder's file says of how it was trained; None where it says nothing.

    What "auto" and "8x" stood for; the data and the harvest that it was trained on.
    """
    asked = metadata.get("settings")
    if not asked:
        return None
    values = {
        f"{section}.{key}": value
        for section in ("transcoder", "train", "data", "harvest")
        for key, value in asked.get(section, {}).items()
    }
    values |= {
        f"train.{key}": value for key, value in metadata.get("used", {}).items() if f"train.{key}" in values
    }
    sizes = [end - begin for begin, end in zip((0, *ends), ends, strict=False)]
    values |= {"transcoder.d_sae": ends[-1], "transcoder.group_sizes": sizes}
    values["harvest"] = str(metadata.get("harvest_fingerprint"))[:8]
    return values | {"git_commit": str(metadata.get("git_commit"))[:8]}


def differing(known: Mapping[str, dict[str, Any] | None]) -> dict[str, dict[str, Any]]:
    """Setting -> transcoder -> value, of the settings that are not the same for all whose files say them."""
    told = {name: values for name, values in known.items() if values is not None}
    keys = dict.fromkeys(key for values in told.values() for key in values)
    table = {key: {name: values[key] for name, values in told.items() if key in values} for key in keys}
    first = {key: next(iter(row.values())) for key, row in table.items()}
    return {
        key: row
        for key, row in table.items()
        if len(row) < len(told) or any(value != first[key] for value in row.values())
    }


def provenance_of_all(of: Provenance, digests: dict[str, str]) -> ComparisonProvenance:
    """What an evaluation of the run would say, as far as it is true of all of them."""
    shared = set(ComparisonProvenance.model_fields) - {"weights_sha256"}
    values = {key: value for key, value in of if key in shared & of.model_fields_set}
    return ComparisonProvenance(**values, weights_sha256=digests)


def chosen(run_dir: Path, others: Sequence[str]) -> list[Path]:
    """Directories and files of the transcoders asked for: names of runs of the same layer, patterns of such names,
    paths, and hf:// addresses.

    What a pattern brings along and is no other transcoder is left out, and told on standard error: the run itself, the
    folder of a sweep's table, a run that is not trained to its end. Raises `InputError` when nothing is left, or a word
    names nothing.
    """
    from train.record import stopped
    from transcoder.weights import FILE_NAME

    transcoders: dict[Path, Path] = {}
    left: list[str] = []
    for path in (path for other in others for path in _paths(run_dir, other)):
        sweep = path.is_dir() and (path / RESULTS).is_file() and not (path / FILE_NAME).is_file()
        why = "it is the run itself" if path.resolve() == run_dir.resolve() else None
        why = why or ("it is the table of a sweep" if sweep else stopped(path))
        if why:
            left.append(f"{path}: {why}")
        else:
            transcoders.setdefault(path.resolve(), path)
    if not transcoders:
        raise InputError(f"with: nothing is left to compare with: {'; '.join(left)}")
    for line in left:
        print(f"left out: {line}", file=sys.stderr)
    return [*transcoders.values()]


def _is_name(other: str) -> bool:
    """Whether a word of WITH may be a run's name, or a pattern of such names."""
    return re.fullmatch(r"[\w.+=*?\[\]-]+", other) is not None and other not in (".", "..")


def _paths(run_dir: Path, other: str) -> list[Path]:
    """What one word of WITH names; a run's name comes before a path of the same spelling."""
    from transcoder.formats import fetched
    from transcoder.weights import FILE_NAME

    runs = run_dir.parent
    is_name = _is_name(other)
    if is_name and (runs / other).is_dir():
        return [runs / other]
    layer = runs.name.removeprefix("layer_")
    path = fetched(other, int(layer) if layer.isdecimal() else None)
    if path.exists():
        return [path]
    if is_name and (matched := sorted(each for each in runs.glob(other) if each.is_dir())):
        return matched
    there = " ".join(sorted(each.parent.name for each in runs.glob(f"*/{FILE_NAME}")))
    raise InputError(f"with: {other}: neither a run of this layer ({there}) nor a path")


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths, of one length, that tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for n in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-n:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise InputError(f"with: {max(paths, key=paths.count)} is given twice")


def holds_all(of: ComparisonProvenance, n_rows: int, file: Path) -> bool:
    """Whether a table has every transcoder of the one in `file`, with the same weights on the same rows."""
    try:
        there = json.loads(file.read_text(encoding="utf-8"))
        weights = set(there["provenance"]["weights_sha256"].values())  # their names depend on the others
        rows = [there["rows"], *(there["provenance"][key] for key in ("split", "store_fingerprint"))]
    except (ValueError, LookupError, TypeError, AttributeError):  # of another version, or damaged
        return False
    return weights <= set(of.weights_sha256.values()) and rows == [
        n_rows,
        of.split,
        of.store_fingerprint,
    ]


def _write(folder: Path, comparison: Comparison) -> None:
    from evaluate.comparison.page import write_page
    from evaluate.files import write_record

    folder.mkdir(exist_ok=True)
    file = folder / "compare.json"
    if file.exists() and not holds_all(comparison.provenance, comparison.rows, file):
        keep_earlier(folder, file.name)
    write_page(folder, comparison)
    write_record(file, comparison)


def main() -> None:
    options = parser("evaluate.compare", "Measure several transcoders on the same held-out rows.")
    add_others(options)
    add_spread(options)
    asked = read(options)
    named, others = asked.arguments.run, asked.arguments.others
    refuse_none(others)

    def one(settings: Settings, _: bool) -> None:
        show(*compare(settings, others), console())

    over_layers(
        asked, one, n_layers=n_layers, chosen=lambda each: chosen_run_of(each, named, others), lines=_lines
    )


def add_others(options: argparse.ArgumentParser) -> None:
    """Give a stage the option --with: what `chosen` understands."""
    options.add_argument(
        "--with",
        dest="others",
        nargs="+",
        default=[],
        metavar="RUN",
        help="other transcoders: run names, directories or files (ours or other tools'), hf:// addresses; for several "
        "layers, run names only",
    )


def chosen_run_of(settings: Settings, named: str | None, others: Sequence[str]) -> Settings:
    """The settings with the run that the command names, or the one there is; `others` of WITH must fit all layers."""
    from transcoder.weights import FILE_NAME, chosen_run

    paths = [other for other in others if not _is_name(other)]
    if paths and len(settings.layers) > 1:
        raise InputError(
            f"with: {paths[0]}: belongs to one layer; for several, WITH takes names of runs that every layer has"
        )
    settings = chosen_run(settings, named)
    for other in others if len(settings.layers) > 1 else ():
        layers = [settings.of_layer(layer).run_dir().parent for layer in settings.layers]
        if not Path(other).exists() and not any(next(layer.glob(other), None) for layer in layers):
            there = " ".join(
                sorted({each.parent.name for layer in layers for each in layer.glob(f"*/{FILE_NAME}")})
            )
            raise InputError(f"with: {other}: no layer asked for has a run of this name ({there or 'none'})")
    return settings


def _lines(settings: Settings) -> list[dict[str, str]]:
    """What the table of several layers says of one: every transcoder's full dictionary."""
    file = settings.run_dir() / "comparison" / "compare.json"
    comparison = Comparison.model_validate_json(file.read_bytes())
    full = {line.transcoder: line for line in comparison.lines}
    return [
        {
            "transcoder": name,
            "latents": f"{line.end:,}",
            "FVU": _with_difference(line),
            "L0": f"{line.l0:.1f}",
            "dead %": f"{100 * line.dead_fraction:.1f}",
        }
        for name, line in full.items()
    ]


def _with_difference(line: ComparedPrefix) -> str:
    """The FVU, without heavy rows and marked where there are some; its difference to the run's in brackets."""
    heavy = line.fvu_typical is not None
    change = line.difference.fvu_typical if heavy else line.difference.fvu
    shown = number_or_dash(line.fvu_typical if heavy else line.fvu) + (f" ({change:+.3f})" if change else "")
    return shown + MARK * heavy


def show(comparison: Comparison, folder: Path, console: Console) -> None:
    """A line for each transcoder and prefix, differences to the run's full dictionary in brackets; then equal L0."""
    language = any(line.cross_entropy for line in comparison.lines)
    columns = ("transcoder", "prefix", "latents", "FVU", "L0", "dead %", *(("CE %",) * language))
    table = table_of(f"the same {rows_of(comparison.rows, comparison.provenance.split)}", columns)
    for line in comparison.lines:
        recovered = line.cross_entropy and line.cross_entropy.recovered_zero
        table.add_row(
            line.transcoder,
            str(line.prefix),
            f"{line.end:,}",
            _with_difference(line),
            f"{line.l0:.1f}",
            f"{100 * line.dead_fraction:.1f}",
            *((number_or_dash(None if recovered is None else 100 * recovered, ".1f"),) * language),
        )
    mark = MARK * bool(comparison.heavy_rows)
    captions = ["CE %: cross-entropy recovered"] * language
    if mark:
        captions.append(f"{MARK} FVU without heavy rows ({comparison.heavy_rows:,}); compare.html has both")
    table.caption = "\n".join(captions)
    console.print(table)
    run, *others = (each.transcoder for each in comparison.transcoders)
    if comparison.equal_l0:
        table = table_of(
            f"at equal L0, FVU{mark} of {run} and of the other",
            ("other", "L0", "FVU", "other's", "difference"),
        )
        for each in comparison.equal_l0:
            numbers = (f"{each.l0:.1f}", f"{each.run_fvu:.3f}", f"{each.fvu:.3f}", f"{each.difference:+.3f}")
            table.add_row(each.other, *numbers)
        console.print(table)
    if without := [other for other in others if other not in {each.other for each in comparison.equal_l0}]:
        plain(console, f"no equal L0: {', '.join(without)}")
    all_rows = " of all rows" * bool(mark)
    plain(console, f"best linear map: FVU{all_rows} {number_or_dash(comparison.linear_map_fvu)}")
    plain(console, f"report {folder / 'compare.html'}")


if __name__ == "__main__":
    run_stage(main)

"""python -m evaluate.compare: several transcoders on the same held-out rows, one table with differences."""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from common.cli import parser, read, run_stage
from common.errors import InputError
from common.layers.driver import add_spread, over_layers
from common.numbers import number_or_dash
from common.settings import Settings
from evaluate.records import ComparedPrefix, Comparison, ComparisonProvenance, Provenance
from evaluate.report.console import plain, rows_of, table_of
from train.sweep import RESULTS, keep_earlier


def compare(settings: Settings, others: Sequence[str]) -> tuple[Comparison, Path]:
    """Measures the run that `settings` name and the `others` (see `chosen`) on the same rows.

    Writes compare.json, compare.png and compare.html into <run>/comparison, and keeps what was there in its folder
    `earlier` if it has other transcoders or rows; returns the values and the folder. Differences are to the run's
    full dictionary.
    """
    from common.device import pick_device  # these import torch, which --help need not wait for
    from common.files import sha256
    from evaluate.metrics.side_by_side import line_of, side_by_side
    from evaluate.run import baselines_for, prepare
    from evaluate.subject import read
    from transcoder.formats import weights_file

    if not others:
        raise InputError('compare: expected other transcoders; give WITH="<run> <dir>" (--with <run> <dir>)')
    job = prepare(settings, ce_tokens=0)
    paths = [job.run_dir, *chosen(settings.run_dir(), others)]
    names = distinct_names(paths)
    device = pick_device(settings.model.device)
    mismatch = settings.evaluate.allow_mismatch
    coders = {
        name: read(path, job.store, mismatch).to(device) for name, path in zip(names, paths, strict=True)
    }
    measured, linear = side_by_side(coders, job.split, job.n_rows, baselines_for(job))
    reference = [each for each in measured if each.transcoder == names[0]][-1]
    digests = {name: sha256(weights_file(path)) for name, path in zip(names, paths, strict=True)}
    comparison = Comparison(
        rows=job.n_rows,
        lines=[line_of(each, reference) for each in measured],
        linear_map_fvu=linear,
        provenance=_provenance(job.provenance, digests),
    )
    folder = job.run_dir / "comparison"
    _write(folder, comparison)
    return comparison, folder


def _provenance(of: Provenance, digests: dict[str, str]) -> ComparisonProvenance:
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
        raise InputError(f"compare: nothing is left to compare with: {'; '.join(left)}")
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
    raise InputError(f"compare: {other}: neither a run of this layer ({there}) nor a path")


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths, of one length, that tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for n in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-n:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise InputError(f"compare: {max(paths, key=paths.count)} is given twice")


def _holds_all(comparison: Comparison, file: Path) -> bool:
    """Whether the comparison has every transcoder of the one in `file`, with the same weights on the same rows."""
    try:
        there = json.loads(file.read_text(encoding="utf-8"))
        weights = set(there["provenance"]["weights_sha256"].values())  # their names depend on the others
        rows = [there["rows"], *(there["provenance"][key] for key in ("split", "store_fingerprint"))]
    except (ValueError, LookupError, TypeError, AttributeError):  # of another version, or damaged
        return False
    of = comparison.provenance
    return weights <= set(of.weights_sha256.values()) and rows == [
        comparison.rows,
        of.split,
        of.store_fingerprint,
    ]


def _write(folder: Path, comparison: Comparison) -> None:
    from markupsafe import Markup

    from common.files import write_whole
    from evaluate.files import write_record
    from evaluate.metrics.side_by_side import COLUMNS
    from evaluate.report import figures, plots
    from evaluate.report.templates import html

    folder.mkdir(exist_ok=True)
    file = folder / "compare.json"
    if file.exists() and not _holds_all(comparison, file):
        keep_earlier(folder, file.name)
    series: dict[str, list[tuple[float, float | None]]] = {}
    for line in comparison.lines:
        series.setdefault(line.transcoder, []).append((line.l0, line.fvu))
    figure = plots.fvu_against_l0(series, comparison.linear_map_fvu)
    plot = figures.save(figure, folder / "compare.png")
    page = html("compare.html", values=comparison, columns=COLUMNS, plot=Markup(plot))
    write_whole(folder / "compare.html", page.encode())
    write_record(file, comparison)


def main() -> None:
    options = parser("evaluate.compare", "Measure several transcoders on the same held-out rows.")
    options.add_argument(
        "--with",
        dest="others",
        nargs="+",
        default=[],
        metavar="RUN",
        help="other transcoders: names of runs, directories and files of ours and other tools', hf://; for several "
        "layers names of runs alone",
    )
    add_spread(options)
    asked = read(options)
    named, others = asked.arguments.run, asked.arguments.others

    def n_layers(settings: Settings) -> int:
        from transcoder.weights import n_layers

        return n_layers(settings)

    def chosen(settings: Settings) -> Settings:
        from transcoder.weights import chosen_run

        if len(settings.layers) < 2:
            return chosen_run(settings, named)
        if paths := [other for other in others if not _is_name(other)]:
            raise InputError(
                f"compare: {paths[0]}: is of one layer; for several, WITH takes names of runs that each of them has"
            )
        return chosen_run(settings, named, every_layer=True)

    def one(settings: Settings, _: bool) -> None:
        show(*compare(settings, others), Console())

    over_layers(asked, one, n_layers=n_layers, chosen=chosen, lines=_lines)


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
    change = line.difference.fvu
    return number_or_dash(line.fvu) + (f" ({change:+.3f})" if change else "")


def show(comparison: Comparison, folder: Path, console: Console) -> None:
    """One line per transcoder and prefix, differences to the run's full dictionary in brackets."""
    columns = ("transcoder", "prefix", "latents", "FVU", "L0", "dead %")
    table = table_of(f"the same {rows_of(comparison.rows, comparison.provenance.split)}", columns)
    for line in comparison.lines:
        table.add_row(
            line.transcoder,
            str(line.prefix),
            f"{line.end:,}",
            _with_difference(line),
            f"{line.l0:.1f}",
            f"{100 * line.dead_fraction:.1f}",
        )
    console.print(table)
    plain(console, f"best linear map: FVU {number_or_dash(comparison.linear_map_fvu)}")
    plain(console, f"report {folder / 'compare.html'}")


if __name__ == "__main__":
    run_stage(main)

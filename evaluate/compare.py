"""python -m evaluate.compare: several transcoders on the same held-out rows, one table with differences."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from rich.console import Console

from common.cli import load, parser, run_stage
from common.device import pick_device
from common.errors import InputError
from common.files import sha256, write_whole
from common.progress import progress
from common.settings import Settings
from evaluate.files import write_json
from evaluate.metrics.baselines import Baselines, fit_ridge
from evaluate.metrics.measure import Measurement
from evaluate.metrics.redundancy import decoder_similarity
from evaluate.metrics.rows import blocks
from evaluate.report import figures, plots
from evaluate.report.console import number_of, plain, rows_of, table_of
from evaluate.report.report import FILTERS, PAGE
from evaluate.run import prepare
from evaluate.subject import read
from train.record import stopped
from train.sweep import RESULTS
from transcoder import Transcoder
from transcoder.formats import fetched, weights_file
from transcoder.weights import FILE_NAME

COLUMNS = {
    "fvu": "FVU",
    "l0": "L0",
    "cosine": "cosine",
    "mse": "MSE",
    "relative_bias": "bias",
    "dead_fraction": "dead share",
    "redundancy": "redundancy",
}


def compare(settings: Settings, others: Sequence[str]) -> tuple[dict[str, Any], Path]:
    """Measures the run that `settings` name and the `others` (see `chosen`) on the same rows.

    Writes compare.json, compare.png and compare.html into <run>/comparison; returns the values and the
    folder. Differences are to the run's full dictionary.
    """
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
    measured, linear = _measure(coders, job.split, job.n_rows, job.store.train)
    reference = measured[names[0]][-1]
    lines = [
        {"transcoder": name, "prefix": g, **line, "difference": _difference(line, reference)}
        for name, prefixes in measured.items()
        for g, line in enumerate(prefixes)
    ]
    kept = ("model", "layer", "input_hook", "output_hook", "split", "store_fingerprint", "metrics_version")
    provenance = {
        key: job.provenance[key] for key in (*kept, "checkpoint", "mismatch") if key in job.provenance
    }
    provenance["weights_sha256"] = {
        name: sha256(weights_file(path)) for name, path in zip(names, paths, strict=True)
    }
    values = {"rows": job.n_rows, "lines": lines, "linear_map_fvu": linear, "provenance": provenance}
    folder = job.run_dir / "comparison"
    _write(folder, values)
    return values, folder


def chosen(run_dir: Path, others: Sequence[str]) -> list[Path]:
    """Directories and files of the transcoders asked for: names of runs of the same layer, patterns of such names,
    paths, and hf:// addresses.

    What a pattern brings along and is no other transcoder is left out, and told on standard error: the run itself, the
    folder of a sweep's table, a run that is not trained to its end. Raises `InputError` when nothing is left, or a word
    names nothing.
    """
    found: dict[Path, Path] = {}
    left: list[str] = []
    for path in (path for other in others for path in _paths(run_dir, other)):
        sweep = path.is_dir() and (path / RESULTS).is_file() and not (path / FILE_NAME).is_file()
        why = "it is the run itself" if path.resolve() == run_dir.resolve() else None
        why = why or ("it is the table of a sweep" if sweep else stopped(path))
        if why:
            left.append(f"{path}: {why}")
        else:
            found.setdefault(path.resolve(), path)
    if not found:
        raise InputError(f"compare: nothing is left to compare with: {'; '.join(left)}")
    for line in left:
        print(f"left out: {line}", file=sys.stderr)
    return [*found.values()]


def _paths(run_dir: Path, other: str) -> list[Path]:
    """What one word of WITH names; a run's name comes before a path of the same spelling."""
    runs = run_dir.parent
    is_name = re.fullmatch(r"[\w.+=*?\[\]-]+", other) and other not in (".", "..")
    if is_name and (runs / other).is_dir():
        return [runs / other]
    path = fetched(other)
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


@torch.inference_mode()
def _measure(
    coders: dict[str, Transcoder], split: Any, n_rows: int, train: Any
) -> tuple[dict[str, list[dict[str, Any]]], float | None]:
    """One pass: every coder's prefixes, and the FVU of the best linear map."""
    measurements = {name: Measurement(coder, select=None) for name, coder in coders.items()}
    baselines = Baselines(fit_ridge(train))
    with progress("compare", n_rows, "rows") as bar:
        for start, stop in blocks(n_rows):
            inputs, outputs = split.rows(start, stop)
            baselines.add(inputs, outputs)
            for measurement in measurements.values():
                device = measurement.coder.W_dec.device
                measurement.add(inputs.to(device), outputs.to(device))
            bar.update(stop - start)
    made, deviation = {}, 0.0
    for name, measurement in measurements.items():
        coder, result = coders[name], measurement.result()
        redundancy, _ = decoder_similarity(coder.W_dec, coder.prefix_ends, n_neighbours=0)
        for prefix, pairs in zip(result["prefixes"], redundancy["prefixes"], strict=True):
            prefix["redundancy"] = pairs["share"]
        made[name] = result["prefixes"]
        deviation = measurement.deviation.total
    return made, baselines.result(deviation)["linear"]["fvu"]


def _difference(line: dict[str, Any], reference: dict[str, Any]) -> dict[str, float | None]:
    pairs = {key: (line[key], reference[key]) for key in COLUMNS}
    return {key: None if None in pair else pair[0] - pair[1] for key, pair in pairs.items()}


def _write(folder: Path, values: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    series: dict[str, list[tuple[float, float | None]]] = {}
    for line in values["lines"]:
        series.setdefault(line["transcoder"], []).append((line["l0"], line["fvu"]))
    figure = plots.fvu_against_l0(series, values["linear_map_fvu"])
    plot = figures.save(figure, folder / "compare.png")
    environment = Environment(loader=FileSystemLoader(PAGE), autoescape=True, undefined=StrictUndefined)
    environment.filters |= FILTERS
    page = environment.get_template("compare.html").render(
        values=values,
        columns=COLUMNS,
        style=Markup((PAGE / "report.css").read_text(encoding="utf-8")),
        plot=Markup(plot),
    )
    write_whole(folder / "compare.html", page.encode())
    write_json(folder / "compare.json", values)


def main() -> None:
    made = parser("evaluate.compare", "Measure several transcoders on the same held-out rows.")
    made.add_argument(
        "--with",
        dest="others",
        nargs="+",
        default=[],
        metavar="RUN",
        help="other transcoders: names of runs, directories, Gemma Scope's params.npz, SAELens' directories, hf://",
    )
    settings, given = load(made)
    show(*compare(settings, given.others), Console())


def show(values: dict[str, Any], folder: Path, console: Console) -> None:
    """One line per transcoder and prefix, differences to the run's full dictionary in brackets."""
    columns = ("transcoder", "prefix", "latents", "FVU", "L0", "dead %")
    table = table_of(f"the same {rows_of(values['rows'], values['provenance']['split'])}", columns)
    for line in values["lines"]:
        change = line["difference"]["fvu"]
        table.add_row(
            line["transcoder"],
            str(line["prefix"]),
            f"{line['end']:,}",
            number_of(line["fvu"]) + (f" ({change:+.3f})" if change else ""),
            f"{line['l0']:.1f}",
            f"{100 * line['dead_fraction']:.1f}",
        )
    console.print(table)
    plain(console, f"best linear map: FVU {number_of(values['linear_map_fvu'])}")
    plain(console, f"report {folder / 'compare.html'}")


if __name__ == "__main__":
    run_stage(main)

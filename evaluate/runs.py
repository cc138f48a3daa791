"""python -m evaluate.runs [--layer 17]: every run below paths.checkpoints, one line each."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.cli import MOST_LAYERS, load, parser, run_stage
from common.errors import InputError
from common.files import sha256, size_of
from common.numbers import HEAVY, marked_fvu
from evaluate.files import finished
from evaluate.kept.evaluations import digests_of, main_evaluation
from evaluate.report.console import typical_fvu
from evaluate.stores import print_table
from shards.plan import human

COLUMNS: tuple[str, ...] = (
    "layer",
    "run",
    "rows",
    "latents",
    "k",
    "rate",
    "FVU",
    "L0",
    "dead %",
    "evaluated",
    "size",
)


def runs_of(checkpoints: Path, layers: tuple[int, ...] = ()) -> Iterator[Path]:
    """Run directories, finished or begun, of these layers (none: of all), by model, layer and name."""
    from train import record
    from transcoder import weights

    folders = [*checkpoints.glob("transcoder/*/layer_*/*/")]
    for run_dir in sorted(folders, key=lambda path: (path.parts[-3], _layer(path), path.name)):
        there = any((run_dir / name).is_file() for name in (weights.FILE_NAME, record.FILE_NAME))
        if there and (not layers or _layer(run_dir) in layers):
            yield run_dir


def _layer(run_dir: Path) -> int:
    text = run_dir.parts[-2].removeprefix("layer_")
    return int(text) if text.isdecimal() else -1


def line_of(run_dir: Path) -> dict[str, str]:
    """What the table says of a run; of one that cannot be read, why in the last column but one."""
    from transcoder import weights

    line = dict.fromkeys(COLUMNS, "-")
    line |= {
        "model": run_dir.parts[-3],
        "layer": run_dir.parts[-2].removeprefix("layer_"),
        "run": run_dir.name,
    }
    line["size"] = human(size_of(run_dir))
    try:
        line |= _trained(run_dir) if (run_dir / weights.FILE_NAME).is_file() else _begun(run_dir)
    except (InputError, OSError, ValueError, LookupError, TypeError) as error:
        line["evaluated"] = f"cannot be read: {error}"
    return line


def _trained(run_dir: Path) -> dict[str, str]:
    """Of a finished or imported run: what its header says, and the evaluation's numbers where there is one of it."""
    from transcoder import weights

    header = weights.read_metadata(run_dir)
    settings, held = header.get("settings") or {}, header.get("heldout") or {}
    line = _asked(settings, header.get("used") or {}) | {"latents": f"{header['prefix_ends'][-1]:,}"}
    if trained := header.get("training"):
        line["rows"] = f"{trained['rows']:,}"
    if held.get("rows"):
        typical = held["fvu_typical"][-1] if held.get("heavy_rows") else None
        dead = held["dead"] / header["prefix_ends"][-1]
        line |= _numbers(marked_fvu(held["fvu"][-1], typical), held["l0"][-1], dead)
    line["evaluated"] = "no" if settings else "no (imported)"
    try:
        evaluation = _evaluation(run_dir, run_dir / weights.FILE_NAME)
        metrics = None if evaluation is None else finished(evaluation)
    except InputError as error:
        why = str(error).split("/metrics.json: ", 1)[-1]
        return line | {"evaluated": f"cannot be read: {why}"}
    if metrics is None:
        return line if evaluation else line | {"evaluated": "before it was trained on"}
    last, split, own = (
        metrics.prefixes[-1],
        metrics.provenance.split,
        metrics.provenance.trained_on_this_store,
    )
    typical = typical_fvu(metrics.errors, len(metrics.prefixes) - 1)
    line |= _numbers(marked_fvu(last.fvu, typical), last.l0, last.dead_fraction)
    if own is False:
        return line | {"evaluated": "on another harvest"}
    return line | {"evaluated": "yes" if split == "heldout" else f"on {split} rows"}


def _evaluation(run_dir: Path, weights: Path) -> Path | None:
    """Folder of the run's main evaluation, of these weights; none if all evaluations are of others.

    The weights are read only where it is in doubt: evaluations of different weights, or a file that is newer than the
    evaluation. A set of Gemma-2-2B has 9 GB of them.
    """
    folder, digests = main_evaluation(run_dir), digests_of(run_dir)
    state = weights.stat()
    if not digests:
        return folder
    written = max(state.st_mtime, state.st_ctime)  # mv and cp -p keep the first
    if len(digests) == 1 and written <= (folder / "metrics.json").stat().st_mtime:
        return folder
    digest = sha256(weights)
    return main_evaluation(run_dir, digest) if digest in digests else None


def _begun(run_dir: Path) -> dict[str, str]:
    """Of a run without weights yet: how far its checkpoint is."""
    from train import record

    said = json.loads((run_dir / record.FILE_NAME).read_text(encoding="utf-8"))
    line = _asked(said["settings"], said.get("used") or {})
    wanted, folder = said["settings"]["train"]["rows"], record.latest(run_dir)
    state: dict[str, Any] = (
        json.loads((folder / "state.json").read_text(encoding="utf-8")) if folder else {"rows": 0, "step": 0}
    )
    line["rows"] = f"{state['rows']:,} of {wanted:,}"
    return line | {"evaluated": f"interrupted at step {state['step']:,}"}


def _asked(settings: dict[str, Any], used: dict[str, Any]) -> dict[str, str]:
    if not settings:
        return {}
    rate = used.get("lr", settings["train"].get("lr"))
    line = {"k": str(settings["transcoder"]["k"]), "latents": str(settings["transcoder"]["d_sae"])}
    return line | {"rate": "auto" if rate is None else f"{rate:.3g}"}


def _numbers(fvu: str, l0: float, dead: float) -> dict[str, str]:
    return {"FVU": fvu, "L0": f"{l0:.1f}", "dead %": f"{100 * dead:.1f}"}


def main() -> None:
    settings, arguments = load(parser("evaluate.runs", __doc__ or ""), n_layers=lambda _: MOST_LAYERS)
    folder = settings.paths.checkpoints
    lines = [line_of(run_dir) for run_dir in runs_of(folder, settings.layers if arguments.layer else ())]
    print_table(lines, COLUMNS, f"no runs in {folder}; train one (make train)", caption=HEAVY)


if __name__ == "__main__":
    run_stage(main)

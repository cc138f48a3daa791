"""python -m train.sweep --layer 17 [--sweep.lr 2e-4,4e-4 ...]: every combination of [sweep], in one pass.

Each run has its own directory, <run>-<what differs>, and is bit-identical to the same run alone.
The table goes to <run>-sweep/results.json, the plot of FVU against L0 to <run>-sweep/sweep.png; those of another sweep
under the same name are kept in <run>-sweep/earlier.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from common.cli import parser, read, run_stage
from common.errors import InputError
from common.files import sha256, write_whole
from common.layers.driver import add_spread, over_layers
from common.numbers import HEAVY, MARK
from common.settings import Settings, changes, first_mistake, latents, run_name
from common.settings import Transcoder as TranscoderSettings
from common.terminal.table import Table, console
from train.log import where
from transcoder.layers import n_layers

RESULTS = "results.json"
"""The table of a sweep, in a folder of its own beside the runs."""


def combinations(settings: Settings, d_in: int) -> list[Settings]:
    """Settings of every run of the sweep, named after what differs."""
    lists = {key: values for key, values in settings.sweep if values}
    if not lists:
        raise InputError("sweep: nothing to combine; give lists in [sweep], or --sweep.lr 2e-4,4e-4")
    runs = [
        _one(settings, dict(zip(lists, values, strict=True)), d_in) for values in product(*lists.values())
    ]
    names = [one.run for one in runs]
    if longest := max(names, key=len)[100:]:
        raise InputError(
            f"sweep: the runs' names are {len(longest)} characters too long; give a shorter RUN=name"
        )
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"sweep: two runs would be called {twice}; list each value once")
    return runs


def _one(settings: Settings, chosen: dict[str, Any], d_in: int) -> Settings:
    """`settings` with one value of each list, and the sizes that follow from it."""
    d_sae, groups = settings.transcoder.resolve(d_in)
    values = settings.model_dump(exclude={"sweep"})
    values["transcoder"] |= {"d_sae": d_sae, "group_sizes": groups}
    plain = Settings.model_validate(values)
    for key, value in chosen.items():
        section = "transcoder" if key in TranscoderSettings.model_fields else "train"
        values[section][key] = value
    try:
        if "group_sizes" in chosen:
            values["transcoder"]["group_sizes"] = sizes = latents(chosen["group_sizes"], d_in)
            values["transcoder"]["d_sae"] = sum(sizes)
        if "d_sae" in chosen:
            (wider,) = latents((chosen["d_sae"],), d_in)
            values["transcoder"] |= {"d_sae": wider, "group_sizes": _in_proportion(groups, wider)}
        run = Settings.model_validate(values)
    except ValidationError as error:
        raise InputError(f"sweep: {first_mistake(error)}") from error
    except ValueError as error:
        raise InputError(f"sweep: {error}") from error
    name = run_name(settings.run, changes(plain, run))
    return run.model_copy(update={"run": name})


def _in_proportion(groups: tuple[int, ...], d_sae: int) -> tuple[int, ...]:
    wider = tuple(group * d_sae / sum(groups) for group in groups)
    if any(size != int(size) for size in wider):
        raise ValueError(f"groups {groups} cannot grow in proportion to {d_sae} latents; sweep group_sizes")
    return tuple(int(size) for size in wider)


def report(runs: list[Settings], folder: Path) -> Table:
    """Write results.json, and sweep.png where there are held-out rows; the table, best FVU of the full prefix first."""
    from train.finish import line_of
    from transcoder.weights import read_metadata

    rows, lines, shown = [], {}, {}
    for settings in runs:
        metadata = read_metadata(settings.run_dir())
        lines[settings.run], heldout = line_of(metadata), metadata["heldout"]
        shown[settings.run] = heldout["fvu_typical" if heldout.get("heavy_rows") else "fvu"][-1]
        rows.append({"run": settings.run, "fvu": heldout["fvu"], "l0": heldout["l0"], "dead": heldout["dead"],
                     "d_sae": metadata["prefix_ends"][-1]})  # fmt: skip
    rows.sort(key=lambda row: (shown[row["run"]] is None, shown[row["run"]]))
    if not _runs_in(folder) <= {row["run"] for row in rows}:
        keep_earlier(folder, RESULTS)
    write_whole(folder / RESULTS, (json.dumps(rows, indent=1) + "\n").encode())
    if measured := [row for row in rows if None not in row["fvu"]]:
        _plot(measured, folder / "sweep.png")
    table = Table("run", *next(iter(lines.values())), title="held-out rows, best first")
    for row in rows:
        table.add_row(row["run"], *lines[row["run"]].values())
    if any(MARK in line["FVU of each prefix"] for line in lines.values()):
        table.caption = HEAVY
    return table


def _runs_in(folder: Path) -> set[str]:
    """The runs of the table that is there; of one that cannot be read its path, which is no run."""
    file = folder / RESULTS
    if not file.exists():
        return set()
    try:
        return {row["run"] for row in json.loads(file.read_text(encoding="utf-8"))}
    except (ValueError, LookupError, TypeError):
        return {str(file)}


def keep_earlier(folder: Path, table: str, alone: bool = False) -> None:
    """Move the files of `folder` to earlier/<date>-<digest> in it, the `table` last: after a kill the rest follows.

    `alone`: the table, without what is beside it.
    """
    file = folder / table
    date = datetime.fromtimestamp(file.stat().st_mtime).date()
    place = folder / "earlier" / f"{date}-{sha256(file)[:8]}"
    place.mkdir(parents=True, exist_ok=True)
    for each in [file] if alone else sorted(folder.iterdir(), key=lambda each: each == file):
        if each.is_file():
            each.replace(place / each.name)
    print(f"the table that was here is kept: {place}", file=sys.stderr)


def _plot(rows: list[dict[str, Any]], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="L0 (active latents per row)", ylabel="FVU on held-out rows")
    for row in rows:
        axes.plot(row["l0"], row["fvu"], marker="o", label=row["run"])
    axes.set_title("Every prefix of every run, coarse to fine")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=150)


def main() -> None:
    options = parser("train.sweep", "Train every combination of [sweep].")
    add_spread(options)
    over_layers(read(options), _sweep, n_layers=n_layers, lines=_best)


def _folder(settings: Settings) -> Path:
    return settings.run_dir().with_name(f"{settings.run}-sweep")


def _sweep(settings: Settings, of_several: bool) -> None:
    from common.nodes.environment import rank
    from shards import Store
    from train import record

    store = Store.of(settings)
    fingerprint, runs = store.manifest.fingerprint, combinations(settings, store.manifest.source.d_in)
    waiting = [one for one in runs if record.finished(one.run_dir(), one, fingerprint) is None]
    folder = _folder(settings)
    print(f"{len(runs)} runs, {len(runs) - len(waiting)} of them already trained")
    if waiting:
        from common.device import share_cores
        from train.loop import train_together

        share_cores()
        with _wandb_group(f"{settings.model_slug}-layer_{settings.layer}-{folder.name}"[:128]):
            train_together(waiting, store)
    if rank() != 0:
        return  # one of the processes writes the table, and shows it
    table = report(runs, folder)
    if of_several and not waiting:
        return
    console().print(table)
    print(f"runs {folder.parent}")
    if (folder / "sweep.png").exists():
        print(f"plot {folder / 'sweep.png'}")
    for line in where(*(one.run_dir() for one in runs)):
        print(line)


@contextmanager
def _wandb_group(name: str) -> Iterator[None]:
    """W&B's group of the runs of one sweep, where the user has not named another."""
    own = "WANDB_RUN_GROUP" in os.environ
    os.environ.setdefault("WANDB_RUN_GROUP", name)
    try:
        yield
    finally:
        if not own:
            del os.environ["WANDB_RUN_GROUP"]


def _best(settings: Settings) -> list[dict[str, str]]:
    """The best run of a layer's sweep, as a line of the table of all layers."""
    from train.finish import line_of
    from transcoder.weights import read_metadata

    first, *_ = json.loads((_folder(settings) / RESULTS).read_text(encoding="utf-8"))
    best = settings.run_dir().with_name(first["run"])
    return [{"best run": first["run"], **line_of(read_metadata(best))}]


if __name__ == "__main__":
    run_stage(main)

"""python -m bench.against_sparsify [--only TEXT ...] [--steps N]: sparsify's transcoder on the same rows, beside ours.

Needs what `make install-peers` installs. Not nested, the same number of latents, k and rows, on the stores of
bench.recipe: sparsify with Adam at three learning rates and with its default, signum at its own rate; ours with the
default recipe and one group. FVU on all held-out rows. JSON: bench/results/sparsify.json, where stores that are left
out keep their numbers.
"""

import argparse
import json
import os
import subprocess
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

from bench.recipe import keep, not_nested, subjects, trained
from common.cli import run_stage
from common.errors import InputError
from common.settings import ROOT, Settings
from shards import Store
from train.recipe import Recipe

RESULTS = ROOT / "bench" / "results" / "sparsify.json"
SCRIPT = ROOT / "bench" / "sparsify_peer.py"
ADAM = ("3e-3", "6e-3", "1.2e-2")
WAYS = [*(("adam", lr) for lr in ADAM), ("signum", "default")]


def rows_of(store: Store, settings: Settings, file: Path, gain: Tensor | float = 1.0) -> None:
    """The train rows in the order that our run sees them, one epoch at most, and all held-out rows.

    `gain`: what the inputs are multiplied by.
    """
    n, parts = settings.train.rows, []
    with closing(
        store.train.loader(settings.train.batch_size, settings.train.order_seed).batches()
    ) as batches:
        for batch in batches:
            parts.append((batch.inputs * gain, batch.outputs.clone()))
            if len(parts) * settings.train.batch_size >= n:
                break
    inputs, outputs = (torch.cat(side) for side in zip(*parts, strict=True))
    heldout = store.heldout.rows(0, len(store.heldout))
    tensors = {
        "inputs": inputs,
        "outputs": outputs,
        "heldout_inputs": heldout[0] * gain,
        "heldout_outputs": heldout[1],
    }
    save_file(tensors, file)


def theirs(
    python: Path, rows: Path, recipe: Recipe, optimizer: str, lr: str, folder: Path | None = None
) -> dict[str, Any]:
    """What sparsify's class reaches; with `folder` it is saved there, in sparsify's own format."""
    objective, asked = recipe.objective, recipe.train
    out = rows.with_suffix(".json")
    numbers = (objective.d_sae, objective.k, asked.batch_size, recipe.steps, recipe.warmup, asked.seed)
    command = [str(python), "-P", str(SCRIPT), str(rows), str(out), *map(str, numbers), optimizer, lr]
    command += [str(folder)] * (folder is not None)
    subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""})
    return json.loads(out.read_text(encoding="utf-8"))


def table(results: dict[str, dict[str, Any]]) -> Table:
    """FVU and the share of latents that never fire, a line a store."""
    shown = Table(title="not nested, held-out FVU (never fire)", title_justify="left")
    for column in ("store", "ours", *(f"sparsify {name} {lr}" for name, lr in WAYS)):
        shown.add_column(column, justify="left" if column == "store" else "right")
    for name, numbers in results.items():
        each = [numbers["ours"], *(numbers[f"{optimizer} {lr}"] for optimizer, lr in WAYS)]
        shown.add_row(name, *(f"{one['fvu']:.3f} ({100 * one['never_fire']:.0f} %)" for one in each))
    return shown


def python_of_peers() -> Path:
    """The other tools' Python; `InputError` where they are not installed."""
    python = ROOT / os.environ.get("PEERS", ".venv-peers") / "bin" / "python"
    if not python.is_file():
        raise InputError(f"{python}: not found; install the other tools with make install-peers")
    return python


def main() -> None:
    options = argparse.ArgumentParser(description="sparsify's transcoder on the same rows, beside ours.")
    options.add_argument(
        "--only", nargs="+", default=[], metavar="TEXT", help="stores whose name holds one of these"
    )
    options.add_argument("--steps", type=int, default=400, help="of 1,024 rows [%(default)s]")
    arguments = options.parse_args()
    python = python_of_peers()
    console, results = Console(width=150), {}
    for name, settings in subjects(console, arguments.only):
        rows = arguments.steps * settings.train.batch_size
        train = settings.train.model_copy(update={"rows": rows})
        settings = not_nested(settings.model_copy(update={"train": train, "run": f"{arguments.steps}_steps"}))
        ours = trained(settings, 0)
        results[name] = {"ours": {key: ours[key][-1] for key in ("fvu", "l0", "never_fire")}}
        with tempfile.TemporaryDirectory(dir=ROOT / ".cache") as scratch:
            file = Path(scratch) / "rows.safetensors"
            store = Store.of(settings)
            recipe = Recipe.of(settings, store)
            rows_of(store, settings, file)
            for optimizer, lr in WAYS:
                results[name][f"{optimizer} {lr}"] = theirs(python, file, recipe, optimizer, lr)
        results[name]["steps"] = arguments.steps
        keep(RESULTS, results)
    console.print(table(results))


if __name__ == "__main__":
    run_stage(main)

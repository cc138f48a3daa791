"""python -m bench.nesting [--layers 12 20] [--seeds 0 1] [--steps N] [--train]: did nesting help?

Of each layer of SmolLM2-135M and each seed (initial weights and order of the rows) three transcoders of the same rows,
number of latents and k: nested, not nested, and sparsify's class, which needs what `make install-peers` installs. What
is trained already is not trained again, and a run that was interrupted goes on; `--train` ends there. Then every metric
of evaluate.absorption and evaluate.probe on the held-out rows. JSON: bench/results/nesting.json.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console

from bench.against_sparsify import python_of_peers, rows_of, theirs
from bench.recipe import WORK, not_nested, subjects
from common.cli import run_stage
from common.settings import ROOT, Settings
from shards import Store
from train import record
from train.loop import train
from train.recipe import Recipe

RESULTS = ROOT / "bench" / "results" / "nesting.json"
LAYERS, SEEDS = (12, 20), (0, 1)
KINDS = ("nested", "one group", "sparsify")
OPTIMIZER = ("adam", "3e-3")
"""Of sparsify: see bench.against_sparsify for the others."""


class Asked(NamedTuple):
    """One trained transcoder of the table."""

    layer: int
    seed: int
    kind: str
    settings: Settings
    """Of the run; for sparsify of the run without nesting that it stands beside."""
    path: Path


def asked(settings: Settings, seed: int, steps: int | None) -> Iterator[Asked]:
    """The three kinds for the layer of `settings`, which are those of the nested run with seed 0."""
    both = {"seed": seed, "order_seed": seed}
    name = f"{settings.run}-seed_{seed}" if seed else settings.run
    nested = settings.model_copy(update={"train": settings.train.model_copy(update=both), "run": name})
    flat, layer = not_nested(nested), settings.layer
    yield Asked(layer, seed, "nested", nested, nested.run_dir())
    yield Asked(layer, seed, "one group", flat, flat.run_dir())
    n = steps or flat.train.rows // flat.train.batch_size
    folder = WORK / "sparsify" / f"{'-'.join(OPTIMIZER)}-steps_{n}-seed_{seed}" / f"layers.{layer}.mlp"
    rows = flat.train.model_copy(update={"rows": n * flat.train.batch_size})
    yield Asked(layer, seed, "sparsify", flat.model_copy(update={"train": rows}), folder)


def ensure(one: Asked) -> None:
    """Trains it where that is not done."""
    store = Store.of(one.settings)
    if one.kind != "sparsify":
        if record.finished(one.path, one.settings, store.manifest.fingerprint) is None:
            train(one.settings, store)
        return
    if one.path.is_dir():
        return
    python, gain = python_of_peers(), torch.tensor(store.manifest.source.gain)
    with tempfile.TemporaryDirectory(dir=ROOT / ".cache") as scratch:
        rows, folder = Path(scratch) / "rows.safetensors", Path(scratch) / "trained"
        # sparsify's transcoders read the MLP's input with the norm's gain, and its directories say nothing else.
        rows_of(store, one.settings, rows, gain if store.manifest.source.input == "normalized" else 1.0)
        theirs(python, rows, Recipe.of(one.settings, store), *OPTIMIZER, folder)
        one.path.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(one.path)


def main() -> None:
    options = argparse.ArgumentParser(description="Nested, one group and sparsify's class on the same rows.")
    options.add_argument("--layers", nargs="+", type=int, default=LAYERS, help="[%(default)s]")
    options.add_argument("--seeds", nargs="+", type=int, default=SEEDS, help="[%(default)s]")
    options.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="[%(default)s]")
    options.add_argument(
        "--steps", type=int, help="of sparsify, of 1,024 rows [as many rows as the other two see]"
    )
    options.add_argument("--train", action="store_true", help="only train what is missing")
    arguments = options.parse_args()
    console = Console(width=150)
    wanted = [f"SmolLM2-135M layer {layer}" for layer in arguments.layers]
    layers = [each for name, each in subjects(console, wanted) if name in wanted]
    ones = [
        each
        for seed in arguments.seeds
        for settings in layers
        for each in asked(settings, seed, arguments.steps)
        if each.kind in arguments.kinds
    ]
    for one in ones:
        console.print(f"layer {one.layer}, seed {one.seed}, {one.kind}: {one.path}", highlight=False)
        ensure(one)


if __name__ == "__main__":
    run_stage(main)

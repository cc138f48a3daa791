"""python -m bench.gpu [ceilings step loop harvest]: what a GPU makes of training and harvest, each beside its floor.

Floor of a step: the encoder's product in the step's precision, and torch.optim.Adam(fused) over parameters of the same
sizes. Floor of a harvest: the bare forward pass. Of a loop: the bare step. Medians, in turns. Results by device:
bench/results/gpu.json; profiles of the step beside it. docs/gpu.md says what was measured. `make gpu` runs all.

`--device cpu` runs the same at a small size: for tests.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bench import harvest as bench_harvest
from bench.train_loop import alternate, wait
from bench.train_step import floor, rows
from common.cli import load, parser, run_stage
from common.device import pick_device
from common.progress import progress
from common.settings import Settings
from shards import Store
from tests.fixtures import make_store
from tests.models import save_model, sentences, write_jsonl
from train.loop import Run, step_for
from train.recipe import initialise
from train.step.losses import Objective, prefix_weights
from train.step.matrix import tensor_cores
from train.step.optimizer import Adam, apply

RESULTS = Path(__file__).parent / "results" / "gpu.json"
D, K = 2304, 96
GROUPS = (1, 2, 4, 9)
"""In proportion: Gemma-2-2B's layer 17 of docs/training.md has 1152, 2304, 4608 and 10368 latents."""
PRECISIONS = ("float32", "tfloat32", "bfloat16")
SIZES = [(1024, 18_432), (4096, 18_432), (16_384, 18_432), (1024, 65_536), (4096, 65_536), (4096, 262_144)]
Part = Callable[[torch.device, bool], dict[str, Any]]


def milliseconds(run: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """Median of `repeats` runs, each waited for; two before them warm up."""
    taken = []
    for _ in range(repeats + 2):
        wait(device)
        begun = time.perf_counter()
        run()
        wait(device)
        taken.append(1000 * (time.perf_counter() - begun))
    return statistics.median(taken[2:])


def ceilings(device: torch.device, small: bool) -> dict[str, Any]:
    """The device's own: copies, and products of square matrices in each precision."""
    n = 256 if small else 8192
    a = torch.randn(n * n, device=device)
    b = torch.empty_like(a)
    figures = {"copy, TB/s": 8 * n * n / milliseconds(lambda: b.copy_(a), device) / 1e9}
    for precision in PRECISIONS:
        square = (a.bfloat16() if precision == "bfloat16" else a).view(n, n)
        with tensor_cores(precision):
            taken = milliseconds(lambda square=square: square @ square, device)
        figures[f"{precision}, TFLOP/s"] = 2 * n**3 / taken / 1e9
    return figures


def step(device: torch.device, small: bool) -> dict[str, Any]:
    """Milliseconds of a step, without and with 5 % dead latents, and of its floor."""
    d, sizes = (64, [(256, 1024)]) if small else (D, SIZES)
    results = {}
    for batch, d_sae in sizes:
        ends = tuple(accumulate(share * d_sae // sum(GROUPS) for share in GROUPS))
        for precision in PRECISIONS:
            if precision == "tfloat32" and device.type == "cpu":
                continue
            objective = Objective(ends, prefix_weights(4), K, "batch_topk", 512, 1.0, precision)
            name = f"{precision}, batch {batch:,}, {ends[-1]:,} latents"
            results[name] = _step(objective, device, batch, d)
            print(name, results[name], flush=True)
    return results


def _step(objective: Objective, device: torch.device, batch: int, d: int) -> dict[str, float]:
    parameters = initialise(d, objective.d_sae, torch.zeros(d), skip=False, seed=0).map(
        lambda t: t.to(device)
    )
    x, y = rows(batch, d, 1).to(device), rows(batch, d, 2).to(device)
    adam, compute = Adam(parameters, objective.prefix_ends), step_for(objective, device)
    measured: dict[str, float] = {}

    @torch.no_grad()
    def once(dead: torch.Tensor) -> None:
        _, gradients = compute(adam.parameters, x, y, dead, objective.k)
        apply(adam, gradients, 1e-4)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for name, n_dead in (("step, ms", 0), ("step with 5 % dead, ms", objective.d_sae // 20)):
        dead = torch.linspace(0, objective.d_sae - 1, n_dead, device=device).long()
        measured[name] = milliseconds(lambda dead=dead: once(dead), device)
    if device.type == "cuda":
        measured["peak memory, GiB"] = torch.cuda.max_memory_allocated(device) / 2**30
        _profile(once, dead, f"{objective.precision}_{batch}_{objective.d_sae}")
    low = torch.bfloat16 if objective.precision == "bfloat16" else torch.float32
    with tensor_cores(objective.precision):
        measured["floor, ms"] = milliseconds(floor(parameters, x, low), device)
    measured["step / floor"] = measured["step, ms"] / measured["floor, ms"]
    return {name: round(value, 3) for name, value in measured.items()}


def _profile(once: Callable[[torch.Tensor], None], dead: torch.Tensor, name: str) -> None:
    """The fifteen kernels that take longest, as a text file."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        once(dead)
        torch.cuda.synchronize()
    text = profiler.key_averages().table(
        sort_by="self_cuda_time_total", row_limit=15, max_name_column_width=60
    )
    (RESULTS.parent / "profiles").mkdir(exist_ok=True, parents=True)
    (RESULTS.parent / "profiles" / f"{name}.txt").write_text(text, encoding="utf-8")


def loop(device: torch.device, small: bool) -> dict[str, Any]:
    """Rows per second of the whole loop (loader, log, probes, samples) beside the bare step on one batch."""
    d, d_sae, n = (64, 512, 4096) if small else (D, 18_432, 65_536)
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        rng = np.random.default_rng(0)
        # Inputs are outputs too: only their sizes matter here.
        train, heldout = (rng.standard_normal((m, d), dtype=np.float32) for m in (n, 4096))
        path = Path(scratch) / "made" / "layer_0.zarr"
        store = make_store(path, (train, train), (heldout, heldout), storage="int8", model="made/rows")
        for batch in (256,) if small else (1024, 4096):
            options = (
                f"--layer 0 --model.name made/rows --wandb.mode disabled --model.device {device} "
                f"--paths.checkpoints {scratch}/runs --run b{batch} --train.lr 1e-5 "
                f"--train.rows {batch * 100_000} --train.batch_size {batch} --transcoder.k {min(K, d_sae // 16)} "
                f"--transcoder.d_sae {d_sae} --transcoder.group_sizes {d_sae // 4},{d_sae * 3 // 4}"
            )
            settings, _ = load(parser("bench.gpu", ""), options.split())
            results[f"batch {batch:,}"] = _loop(settings, store, device, 10 if small else 100)
    return results


def _loop(settings: Settings, store: Store, device: torch.device, turn: int) -> dict[str, float]:
    bare, whole, waiting = alternate(Run(settings, store, device), turn)
    figures = {"bare step, ms": 1000 * bare, "loop, ms": 1000 * whole, "loop / step": whole / bare}
    figures |= {"waiting for data, ms": 1000 * waiting, "rows/s": settings.train.batch_size / whole}
    return {name: round(value, 3) for name, value in figures.items()}


def harvest(device: torch.device, small: bool) -> dict[str, Any]:
    """Tokens per second of a harvest beside the bare forward pass: Gemma-2-2B's widths, 4 layers, random weights."""
    widths = {"hidden_size": 2304, "intermediate_size": 9216, "num_attention_heads": 8, "head_dim": 256}
    narrow = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16}
    layers = {"num_hidden_layers": 4, "num_key_value_heads": 4}
    with tempfile.TemporaryDirectory() as scratch:
        sizes = (narrow if small else widths) | layers
        model = save_model(Path(scratch) / "gemma", "gemma2", dtype=torch.bfloat16, **sizes)
        text = write_jsonl(Path(scratch) / "text.jsonl", sentences(400 if small else 30_000, words=40))
        options = (
            f"--layer 2 --model.name {model} --data.files {text} --data.pack concat --model.device {device} "
            f"--harvest.context_length 64 --harvest.heldout_fraction 0.1 --harvest.batch_size 64 "
            f"--harvest.rows {4096 if small else 150_000}"
        )
        return bench_harvest.speed(Path(scratch), options.split())


PARTS: dict[str, Part] = {"ceilings": ceilings, "step": step, "loop": loop, "harvest": harvest}


def main() -> None:
    options = argparse.ArgumentParser(description="Training and harvest on a GPU, each beside its floor.")
    options.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} [all of them]")
    options.add_argument("--device", default="cuda", help="[%(default)s]")
    arguments = options.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        options.error(f"PART: expected some of {', '.join(PARTS)}, found {', '.join(sorted(unknown))}")
    device = pick_device(arguments.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    with progress("gpu", len(arguments.parts or PARTS), "parts") as bar:
        for part in arguments.parts or PARTS:
            results = PARTS[part](device, device.type == "cpu")
            kept.setdefault(name, {"torch": torch.__version__})[part] = results
            Console(width=150).print(table(f"{part} on {name}", results))
            if device.type == "cuda":
                RESULTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
            bar.update(1)


def table(title: str, results: dict[str, Any]) -> Table:
    """One line a figure, or a case and its figures."""
    nested = {
        name: value if isinstance(value, dict) else {"figure": value} for name, value in results.items()
    }
    columns = list(dict.fromkeys(column for figures in nested.values() for column in figures))
    shown = Table("", *columns, title=title, title_justify="left")
    for name, figures in nested.items():
        shown.add_row(name, *(f"{figures[column]:,.4g}" if column in figures else "-" for column in columns))
    return shown


if __name__ == "__main__":
    run_stage(main)

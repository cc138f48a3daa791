"""python -m bench.scale: what a training takes as it is split over more processes. Tables, and docs/images/scale.png.

1. Measured here, with gloo: 20 steps of every mesh of up to 4 processes against one process: how far the weights are
   apart, bytes handed over in a step, seconds of a step (4 processes share 2 cores: no speed-up can show), peak memory.
   And harvests of the demo's model with one thread in each of 1 and 2 processes: tokens a second.
2. Derived for H100s: memory of a process and bytes by train/plan/splits.py, time of a step by a fit through the steps
   that were measured on one H100 (bench/results/gpu.json) and the links' speeds below. Nothing is taken to overlap.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.mesh import mesh_of
from common.processes import joined
from shards.manifest import read_manifest
from shards.plan import human
from train.plan.splits import Split, splits
from train.recipe import initialise
from train.state import State
from train.step.losses import Objective, prefix_weights
from train.step.optimizer import apply
from train.step.sparse import SparseStep

STEPS = 20
WIDTH, ROWS, LATENTS, K = 576, 512, 16_384, 32
"""Of the measured part: the demo's width, four groups as in its recipe."""
MESHES = ((1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (1, 4))
SHARES = (1, 3, 7, 16)
"""Prefix ends in sixteenths of the latents, as in pipeline.toml."""

HARVESTERS, HARVESTED = (1, 2), (65_536, 262_144)
"""Numbers of processes, and of train rows: 2 and 8 windows."""
NVLINK, INFINIBAND = 450e9, 50e9
"""Bytes/s that one GPU sends: fourth-generation NVLink, one direction (NVIDIA H100 data sheet: 900 GB/s both ways), and
one 400 Gb/s network adapter for each GPU."""
SHARE = 0.7
"""Of these that a collective usually reaches."""
NODE = 8
"""GPUs of a machine, joined by NVLink."""
MEMORY = 80e9
GPU = torch.device("cuda")
DERIVED_ROWS, DERIVED_WIDTH, DERIVED_K = 16_384, 2304, 96
SIZES = (18_432, 73_728, 294_912, 1_048_576, 4_194_304)
PROCESSES = (1, 2, 4, 8, 16, 32, 64)


def objective(d_sae: int, k: int, precision: str = "float32") -> Objective:
    ends = tuple(d_sae * share // 16 for share in SHARES)
    return Objective(ends, prefix_weights(4), k, "batch_topk", 512, 0.125, precision)


# -- measured ------------------------------------------------------------------------------------------


def child(out: Path, shards: int) -> None:
    """Train STEPS steps in this process of a mesh; leaves its latents and what it has measured in `out`."""
    torch.set_grad_enabled(False)
    whole, sent, seconds = objective(LATENTS, K), [0], []
    _count(sent)
    with joined() as everyone:
        mesh = mesh_of(everyone, shards)
        latents = mesh.part(LATENTS)
        parameters = initialise(WIDTH, LATENTS, torch.zeros(WIDTH), skip=False, seed=0, latents=latents)
        state = State.start(parameters, whole.prefix_ends, latents=latents)
        own = whole.of(latents)
        step, none = SparseStep(own, mesh), torch.zeros(0, dtype=torch.int64)
        for number in range(STEPS):
            x, y = _rows(number, mesh.rows.rank, mesh.rows.world)
            everyone.wait()
            sent[0], begun = 0, time.perf_counter()
            _, gradients = step(state.parameters, x, y, none, K)
            apply(state.adam, gradients.over(mesh.rows, own.d_sae), 1e-3, None, mesh.latents)
            seconds.append(time.perf_counter() - begun)
        if mesh.rows.leads:
            save_file(state.parameters.named(), out / f"{mesh.latents.rank}.safetensors")
        figures = {"sent": sent[0], "seconds": median(seconds[1:]), "peak": _peak()}
        (out / f"{everyone.rank}.json").write_text(json.dumps(figures), encoding="utf-8")


def _rows(step: int, rank: int, world: int) -> tuple[Tensor, Tensor]:
    """This process's rows of a step's batch: the same batch, however many share it."""
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(2, ROWS, WIDTH, generator=generator)
    return x.chunk(world)[rank].contiguous(), y.chunk(world)[rank].contiguous()


def _count(sent: list[int]) -> None:
    """Add up the bytes that are handed to collectives."""

    def counted(name: str, argument: int) -> None:
        original = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            sent[0] += args[argument].numel() * args[argument].element_size()
            return original(*args, **kwargs)

        setattr(dist, name, call)

    counted("all_reduce", 0)
    counted("all_gather", 1)


def _peak() -> int:
    """Bytes of the most anonymous memory so far."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


class Measured(NamedTuple):
    apart: float
    sent: int
    seconds: float
    peak: int


def measured(
    scratch: Path, rows: int, shards: int, reference: dict[str, Tensor] | None
) -> tuple[Measured, Any]:
    """(figures, weights) of a mesh; `reference`: the weights of one process."""
    out, world = scratch / f"{rows}x{shards}", rows * shards
    out.mkdir()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    command = [*torchrun, "-m", "bench.scale", "--child", str(out), "--shards", str(shards)]
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
    parts = [load_file(out / f"{i}.safetensors") for i in range(shards)]
    weights = {
        name: parts[0][name] if name == "b_dec" else torch.cat([part[name] for part in parts])
        for name in parts[0]
    }
    reference = reference or weights
    apart = max(float((weights[n] - w).norm() / w.norm()) for n, w in reference.items())
    figures = [json.loads((out / f"{i}.json").read_text(encoding="utf-8")) for i in range(world)]
    sent, seconds, peak = (max(each[name] for each in figures) for name in ("sent", "seconds", "peak"))
    return Measured(apart, sent, seconds, peak), weights


def measured_table() -> Table:
    title = f"{LATENTS:,} latents, width {WIDTH}, {ROWS} rows a step, K {K}: {STEPS} steps with gloo"
    columns = (
        "rows x latents",
        "weights apart",
        "sent a step",
        "by the plan",
        "s a step",
        "peak",
        "by the plan",
    )
    table = Table(*columns, title=title)
    alone, program = None, 0
    with tempfile.TemporaryDirectory() as folder:
        for rows, shards in MESHES:
            found, weights = measured(Path(folder), rows, shards, alone)
            alone = alone or weights
            plans = splits(
                objective(LATENTS, K), WIDTH, WIDTH, ROWS, rows * shards, torch.device("cpu"), samples=False
            )
            plan = next(each for each in plans if each.latents == shards)
            planned = plan.state + plan.step  # without the program
            program = program or found.peak - planned  # of one process: interpreter and PyTorch
            cells = (human(found.sent), human(plan.sent), f"{found.seconds:.3f}")
            memory = (human(found.peak - program), human(planned))
            table.add_row(f"{rows} x {shards}", f"{found.apart:.1e}", *cells, *memory)
    table.caption = "peak: without what one process has beyond its plan (interpreter, PyTorch)"
    return table


def harvest_table() -> Table:
    """Tokens a second of a harvest, from the time that more windows take: loading the model is not in it."""
    table = Table(
        "processes", "tokens/s", "of one process", title="harvest of the demo's layer 12, one thread each"
    )
    rates: dict[int, float] = {}
    for processes in HARVESTERS:
        few, many = (_harvest(processes, rows) for rows in HARVESTED)
        rates[processes] = (many[0] - few[0]) / (many[1] - few[1])
        table.add_row(str(processes), f"{rates[processes]:,.0f}", f"{rates[processes] / rates[1]:.2f}")
    return table


def _harvest(processes: int, rows: int) -> tuple[int, float]:
    """(rows written, seconds) of a whole command."""
    with tempfile.TemporaryDirectory() as folder:
        stage = ["harvest", "--profile", "demo", "--layer", "12", "--harvest.rows", str(rows)]
        command = [
            sys.executable,
            "-m",
            "common.launch",
            str(processes),
            *stage,
            "--paths.activations",
            folder,
        ]
        begun = time.perf_counter()
        subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
        seconds = time.perf_counter() - begun
        (store,) = Path(folder).glob("*/*.zarr")
        return sum(split.rows for split in read_manifest(store).splits.values()), seconds


# -- derived -------------------------------------------------------------------------------------------


def fitted() -> np.ndarray:
    """t = a + b B F + c F + e B in seconds, through the TF32 steps that were measured on an H100."""
    results = json.loads(Path("bench/results/gpu.json").read_text(encoding="utf-8"))
    (device,) = results.values()
    points = []
    for name, figures in device["step"].items():
        precision, batch, latents = name.split(", ")
        if precision == "tfloat32":
            numbers = (batch.split()[1], latents.split()[0])
            points.append((*(int(n.replace(",", "")) for n in numbers), figures["step, ms"] / 1e3))
    B, F, seconds = np.array(points).T
    # relative errors count: the steps differ by a factor of 27
    terms = _terms(B, F) / seconds[:, None]
    return np.linalg.lstsq(terms, np.ones_like(seconds), rcond=None)[0]


def _terms(B: Any, F: Any) -> np.ndarray:
    B, F = np.asarray(B, float), np.asarray(F, float)
    return np.stack([np.ones_like(B * F), B * F, F * np.ones_like(B), B * np.ones_like(F)], -1)


def seconds_of(split: Split, d_sae: int, fit: np.ndarray) -> float:
    """Of a step: what the process computes, then what it sends, around a ring for each group of processes."""
    computed = float(_terms(DERIVED_ROWS / split.rows, d_sae / split.latents) @ fit)
    of_latents = _ring(split.sent_for_latents, split.latents, 1)
    return computed + of_latents + _ring(split.sent_for_rows, split.rows, split.latents)


def _ring(size: int, processes: int, apart: int) -> float:
    """Seconds of a sum of `size` bytes over processes whose ranks are `apart` from each other."""
    link = NVLINK if processes * apart <= NODE else INFINIBAND
    return 2 * (processes - 1) / processes * size / (SHARE * link)


def derived() -> dict[int, dict[int, tuple[Split, float]]]:
    """d_sae -> processes -> (the split that fits and takes the least time, its seconds)."""
    fit, found = fitted(), {}
    for d_sae in SIZES:
        goal = objective(d_sae, DERIVED_K, "tfloat32")
        found[d_sae] = {}
        for processes in PROCESSES:
            every = splits(goal, DERIVED_WIDTH, DERIVED_WIDTH, DERIVED_ROWS, processes, GPU)
            fits = [(split, seconds_of(split, d_sae, fit)) for split in every if split.together <= MEMORY]
            if fits:
                found[d_sae][processes] = min(fits, key=lambda pair: pair[1])
    return found


def derived_table(found: dict[int, dict[int, tuple[Split, float]]]) -> Table:
    title = f"derived for H100s (80 GB): width {DERIVED_WIDTH:,}, {DERIVED_ROWS:,} rows a step, K {DERIVED_K}, TF32"
    columns = ("latents", "GPUs", "rows x latents", "memory each", "sent a step", "ms a step", "rows/s")
    table = Table(
        *columns, title=title, caption="the split that fits and takes the least time; no line: none fits"
    )
    for d_sae, by_processes in found.items():
        for processes, (split, seconds) in by_processes.items():
            cells = (
                human(split.together),
                human(split.sent),
                f"{1e3 * seconds:,.1f}",
                f"{DERIVED_ROWS / seconds:,.0f}",
            )
            table.add_row(f"{d_sae:,}", str(processes), f"{split.rows} x {split.latents}", *cells)
        table.add_section()
    return table


def plot(found: dict[int, dict[int, tuple[Split, float]]], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for d_sae, by_processes in found.items():
        processes = list(by_processes)
        pairs = by_processes.values()
        left.plot(processes, [split.together / 1e9 for split, _ in pairs], marker="o", label=f"{d_sae:,}")
        right.plot(
            processes, [DERIVED_ROWS / seconds for _, seconds in pairs], marker="o", label=f"{d_sae:,}"
        )
    left.axhline(MEMORY / 1e9, color="0.6", linestyle="--")
    left.set_ylabel("GB of each GPU")
    right.set_ylabel("rows a second, derived")
    for axes in (left, right):
        axes.set_xlabel("GPUs")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(PROCESSES, map(str, PROCESSES))
        axes.grid(alpha=0.3)
    left.legend(title="latents", fontsize="small")
    figure.savefig(file, dpi=150)


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--derived", action="store_true", help="the second part alone: arithmetic")
    options.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options.add_argument("--shards", type=int, help=argparse.SUPPRESS)
    arguments = options.parse_args()
    if arguments.child:
        child(arguments.child, arguments.shards)
        return
    console = Console()
    if not arguments.derived:
        console.print(measured_table(), harvest_table())
    found = derived()
    console.print(derived_table(found))
    plot(found, Path("docs/images/scale.png"))


if __name__ == "__main__":
    main()

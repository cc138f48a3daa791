"""python -m bench.train_size: step time and memory against the number of latents, K fixed; plot in docs/.

Nothing but the encoder product, Adam and buffers may grow with F. Each size runs in its own process,
so that its peak memory is its own. D 576 and K 32, as in the demo, so that 262,144 latents fit.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench.train_step import floor, rows, sparse
from tests.memory import resident
from train.plan import memory
from train.recipe import initialise
from train.step.losses import Objective

SIZES = (4096, 16_384, 65_536, 262_144)
D, K, BATCH = 576, 32, 1024
RESULTS = Path(__file__).parent / "results" / "train_size.json"
PLOT = Path(__file__).parent.parent / "docs" / "images" / "training_size.png"


def one(d_sae: int, repeats: int = 3) -> dict[str, float]:
    """Median seconds of step and floor, peak memory in bytes, of one size."""
    ends = (d_sae // 16, d_sae * 3 // 16, d_sae * 7 // 16, d_sae)
    objective = Objective(ends, (0.25,) * 4, K, "batch_topk", 512, 1.0)
    parameters = initialise(D, d_sae, torch.zeros(D), skip=False, seed=0)
    x, y = rows(BATCH, D, 1), rows(BATCH, D, 2)
    step = sparse(parameters, objective, x, y)
    result = {}
    for name in ("step", "floor"):
        once = step if name == "step" else floor(parameters, x, torch.float32)
        times = []
        for _ in range(repeats + 1):
            begun = time.perf_counter()
            once()
            times.append(time.perf_counter() - begun)
        result[name] = statistics.median(times[1:])
        if name == "step":
            result["memory"] = (
                resident("VmHWM") - 4 * d_sae * 2 * D
            )  # the bench's own second copy of the weights
    result["planned"] = memory.kept(objective, D, D) + memory.passing(objective, D, D, BATCH) + memory.PROGRAM
    return result


def plot(results: dict[int, dict[str, float]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, names, unit, scale in (
        (left, ("step", "floor"), "seconds", 1.0),
        (right, ("memory", "planned"), "GiB", 2**-30),
    ):
        for name in names:
            axes.loglog(
                list(results), [values[name] * scale for values in results.values()], "o-", label=name
            )
        axes.set(xlabel="latents", ylabel=unit)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(PLOT, dpi=150)


def main() -> None:
    if len(sys.argv) == 2:
        print(json.dumps(one(int(sys.argv[1]))))
        return
    results = {}
    for size in SIZES:
        command = [sys.executable, "-m", "bench.train_size", str(size)]
        results[size] = json.loads(
            subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout
        )
    table = Table("latents", "step, s", "floor, s", "memory, GiB", "planned, GiB")
    for size, values in results.items():
        gib = (f"{values[name] / 2**30:.2f}" for name in ("memory", "planned"))
        table.add_row(f"{size:,}", f"{values['step']:.3f}", f"{values['floor']:.3f}", *gib)
    Console().print(table)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    plot(results)


if __name__ == "__main__":
    main()

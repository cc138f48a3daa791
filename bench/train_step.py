"""python -m bench.train_step: the training step against its floor and against the dense reference.

Everything runs in one process, one after the other in turns, so that a noisy machine is noisy for
all; medians. The floor is what no exact step can do without: the encoder's product and fused Adam.

Shapes: B 1,024, D 2,304, F 18,432 in the groups of Gemma-2-2B's layer 17, K 96.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from train.recipe import initialise
from train.step.dense import DenseStep
from train.step.losses import Objective
from train.step.optimizer import BETAS, Adam, apply, project, renormalise
from train.step.sparse import SparseStep
from transcoder.transcoder import Parameters

RESULTS = Path(__file__).parent / "results" / "train_step.json"
LR = 1e-4
Contender = Callable[[], None]


def rows(n: int, width: int, seed: int) -> torch.Tensor:
    """Rows like MLP inputs: a few strong common directions, and the rest."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(n, 64, generator=generator) @ torch.randn(64, width, generator=generator) / 8
    return (common + torch.randn(n, width, generator=generator)) / 2**0.5


def floor(parameters: Parameters, x: torch.Tensor, dtype: torch.dtype) -> Contender:
    """Encoder product + torch.optim.Adam(fused) over parameters of the same sizes."""
    W_enc, inputs = parameters.W_enc.to(dtype), x.to(dtype)
    pre = W_enc.new_empty(len(x), len(W_enc))
    leaves = [tensor.clone().requires_grad_() for tensor in parameters.named().values()]
    for leaf in leaves:
        leaf.grad = torch.full_like(leaf, 1e-3)
    optimizer = torch.optim.Adam(leaves, lr=1e-9, fused=True)

    def once() -> None:
        with torch.no_grad():
            torch.mm(inputs, W_enc.T, out=pre)
        optimizer.step()

    return once


def dense(parameters: Parameters, objective: Objective, x: torch.Tensor, y: torch.Tensor) -> Contender:
    """The dense step with torch.optim.Adam as it comes, and the constraint on whole matrices."""
    leaves = parameters.map(lambda tensor: tensor.clone().requires_grad_())
    optimizer = torch.optim.Adam(leaves.named().values(), lr=LR, betas=BETAS)
    step, none = DenseStep(objective), torch.arange(0)

    def once() -> None:
        _, gradients = step(leaves, x, y, none, objective.k)
        whole = gradients.whole()
        with torch.no_grad():
            project(whole["W_dec"], (whole["W_dec"] * leaves.W_dec).sum(1), leaves.W_dec)
            for name, gradient in whole.items():
                leaves.named()[name].grad = gradient
            optimizer.step()
            renormalise(leaves.W_dec)

    return once


def sparse(
    parameters: Parameters, objective: Objective, x: torch.Tensor, y: torch.Tensor, n_dead: int = 0
) -> Contender:
    adam, step = Adam(parameters.map(torch.clone)), SparseStep(objective)
    dead = torch.linspace(0, objective.d_sae - 1, n_dead).long()

    @torch.no_grad()
    def once() -> None:
        _, gradients = step(adam.parameters, x, y, dead, objective.k)
        apply(adam, gradients, LR)

    return once


def contenders(groups: tuple[int, ...], d: int, k: int, batch: int) -> dict[str, Contender]:
    objective = Objective(
        tuple(accumulate(groups)), (1 / len(groups),) * len(groups), k, "batch_topk", 512, 1.0
    )
    half = replace(objective, precision="bfloat16")
    x, y = rows(batch, d, 1), rows(batch, d, 2)
    parameters = initialise(d, objective.d_sae, torch.zeros(d), skip=False, seed=0)
    some = objective.d_sae // 20
    return {
        "floor": floor(parameters, x, torch.float32),
        "floor bf16": floor(parameters, x, torch.bfloat16),
        "dense": dense(parameters, objective, x, y),
        "sparse": sparse(parameters, objective, x, y),
        "sparse bf16": sparse(parameters, half, x, y),
        "sparse, 5 % dead": sparse(parameters, objective, x, y, some),
    }


def measure(named: dict[str, Contender], repeats: int) -> dict[str, float]:
    """Median seconds of each, in turns; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in named}
    for turn in range(repeats + 1):
        for name, once in named.items():
            begun = time.perf_counter()
            once()
            if turn:
                times[name].append(time.perf_counter() - begun)
    return {name: statistics.median(taken) for name, taken in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", help="names of contenders")
    parser.add_argument("--wide", action="store_true", help="F 36,864, layer 12's recipe, instead of 18,432")
    arguments = parser.parse_args()
    groups = (2304, 4608, 9216, 20736) if arguments.wide else (1152, 2304, 4608, 10368)
    named = contenders(groups, d=2304, k=96, batch=1024)
    named = {name: once for name, once in named.items() if not arguments.only or name in arguments.only}
    table = Table("step", *(f"seconds, {n} thread(s)" for n in arguments.threads))
    timings = {}
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        timings[threads] = measure(named, arguments.repeats)
    for name in named:
        table.add_row(name, *(f"{timings[n][name]:.3f}" for n in arguments.threads))
    Console().print(table)
    RESULTS.parent.mkdir(exist_ok=True)
    size = f"F {sum(groups)}"
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for threads, seconds in timings.items():
        kept.setdefault(size, {}).setdefault(f"{threads} threads", {}).update(seconds)
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

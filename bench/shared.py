"""python -m bench.shared: training beside another busy program, with two threads, two that wait asleep, and one.

A child process for each trains on random rows at the demo's sizes, alone and beside a process that keeps one core
busy, in turns. A stage takes one thread less for each busy core (common/device.py).
"""

import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.table import Table

WAYS = {
    "all threads": {},
    "all threads, OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
ROUNDS, SECONDS = 3, 6.0


def child() -> None:
    """Prints the rows per second of SECONDS of training."""
    import time

    import torch

    from train.recipe import initialise
    from train.step.losses import Objective, prefix_weights
    from train.step.optimizer import Adam, apply
    from train.step.sparse import SparseStep

    rows, width, ends = 1024, 576, (288, 864, 2016, 4608)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    x, y = torch.randn(2, rows, width)
    parameters = initialise(width, ends[-1], torch.zeros(width), skip=False, seed=0)
    adam = Adam(parameters)
    step = SparseStep(Objective(ends, prefix_weights(4), 32, "batch_topk", 0, 0.0))
    none = torch.zeros(0, dtype=torch.int64)
    apply(adam, step(parameters, x, y, none, 32)[1], 1e-4)
    begun, steps = time.perf_counter(), 0
    while time.perf_counter() - begun < SECONDS:
        apply(adam, step(parameters, x, y, none, 32)[1], 1e-4)
        steps += 1
    print(steps * rows / (time.perf_counter() - begun))


@contextmanager
def busy(wanted: bool) -> Iterator[None]:
    """A process that does nothing but keep a core busy."""
    if not wanted:
        yield
        return
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        try:
            yield
        finally:
            with suppress(ProcessLookupError):
                other.kill()


def rows_per_second(way: dict[str, str], beside: bool) -> float:
    """Of one child."""
    names = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS")
    env = {key: value for key, value in os.environ.items() if key not in names} | way
    with busy(beside):
        process = subprocess.run(
            [sys.executable, "-m", "bench.shared", "child"],
            env=env,
            capture_output=True,
            encoding="utf-8",
            check=True,
        )
    return float(process.stdout)


def main() -> None:
    if sys.argv[1:] == ["child"]:
        child()
        return
    speeds: dict[tuple[str, bool], list[float]] = {}
    for _ in range(ROUNDS):
        for name, way in WAYS.items():
            for beside in (False, True):
                speeds.setdefault((name, beside), []).append(rows_per_second(way, beside))
    table = Table("threads", "alone, rows/s", "beside one busy process", title="medians of 3")
    for name in WAYS:
        table.add_row(name, *(f"{statistics.median(speeds[name, beside]):,.0f}" for beside in (False, True)))
    Console().print(table)


if __name__ == "__main__":
    main()

"""python -m bench.train_loop STORE --layer 17 ...: the whole training loop on a store against the bare step.

The loop reads, dequantises, logs every 50 steps, collects samples and draws the bar; the bare step trains on
one batch again and again. Both take the settings of the command line, in turns of 20 steps in one process, without
the auxiliary loss: one batch again and again has other dead latents than fresh ones.
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch

from common.cli import load, parser
from shards import Store
from train.loop import Run, train_step

TURN, TURNS = 20, 3


def wait(device: torch.device) -> None:
    """Until a GPU has done what was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def alternate(run: Run, turn: int, turns: int = TURNS) -> tuple[float, float, float]:
    """Median seconds of the bare step and of the loop, in turns of `turn` steps, and seconds a step waits for data.

    The first turn warms up. Closes the run's log.
    """
    device = run.state.last_fired.device
    loader = run.store.train.loader(run.settings.train.batch_size, epochs=None, device=device)
    batches = loader.batches()
    batch = next(batches)
    bare, loop, waiting = [], [], 0.0
    for number in range(turns + 1):
        wait(device)
        begun = time.perf_counter()
        for _ in range(turn):
            train_step(run.state, run.step, run.recipe, batch.inputs, batch.outputs)
        wait(device)
        middle = time.perf_counter()
        for _ in range(turn):
            before = time.perf_counter()
            following = next(batches)
            waiting += time.perf_counter() - before if number else 0.0
            run.feed(following, loader.batches_per_epoch, 0.0)
        wait(device)
        if number:
            bare.append((middle - begun) / turn)
            loop.append((time.perf_counter() - middle) / turn)
    batches.close()
    assert run.log is not None
    run.log.close()
    return statistics.median(bare), statistics.median(loop), waiting / (turns * turn)


def main() -> None:
    options = parser("bench.train_loop", "The whole training loop against the bare step.")
    settings, _ = load(options)
    store = Store.open(settings.store_path(settings.layer))
    with tempfile.TemporaryDirectory() as scratch:
        paths = settings.paths.model_copy(update={"checkpoints": Path(scratch)})
        training = settings.train.model_copy(update={"aux_coefficient": 0.0})
        run = Run(settings.model_copy(update={"paths": paths, "train": training}), store, torch.device("cpu"))
        a, b, _ = alternate(run, TURN)
    print(f"threads {torch.get_num_threads()}: bare step {a:.4f} s, loop {b:.4f} s, ratio {b / a:.3f}")


if __name__ == "__main__":
    main()

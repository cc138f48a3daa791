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


def main() -> None:
    options = parser("bench.train_loop", "The whole training loop against the bare step.")
    settings, _ = load(options)
    store = Store.open(settings.store_path(settings.layer))
    with tempfile.TemporaryDirectory() as scratch:
        paths = settings.paths.model_copy(update={"checkpoints": Path(scratch)})
        training = settings.train.model_copy(update={"aux_coefficient": 0.0})
        run = Run(settings.model_copy(update={"paths": paths, "train": training}), store, torch.device("cpu"))
        loader = store.train.loader(settings.train.batch_size, epochs=None)
        batches = loader.batches()
        batch = next(batches)
        bare, loop = [], []
        for turn in range(TURNS + 1):
            begun = time.perf_counter()
            for _ in range(TURN):
                train_step(run.state, run.step, run.recipe, batch.inputs, batch.outputs)
            middle = time.perf_counter()
            for _ in range(TURN):
                run.feed(next(batches), loader.batches_per_epoch, 0.0)
            if turn:
                bare.append((middle - begun) / TURN)
                loop.append((time.perf_counter() - middle) / TURN)
        assert run.log is not None
        run.log.close()
    a, b = statistics.median(bare), statistics.median(loop)
    print(f"threads {torch.get_num_threads()}: bare step {a:.4f} s, loop {b:.4f} s, ratio {b / a:.3f}")


if __name__ == "__main__":
    main()

"""python -m bench.harvest: tokens per second against the bare forward pass, and peak memory at two sizes.

Speed: the demo's model and text; blocks of windows are harvested and, in turns, the same contexts are run through
the same early-stopped model with nothing else done. Medians of several turns in one process.
Memory: Gemma-2's real width (2,304) with eight layers and random weights; peak resident size of the whole command
minus that of loading the model and running a few batches: of 1, 4 and 8 layers, and of one at three times the rows.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from common.cli import load, parser
from common.settings import Settings
from harvest import lm, run
from harvest.activations import Kept
from shards import Store
from shards.layout import SHARD_ROWS
from shards.reader import Contexts
from tests.models import save_wide_gemma, sentences, write_jsonl

RESULTS = Path("bench/results/harvest.json")
TURNS, WINDOWS = 3, 2


def settings(*argv: str) -> Settings:
    return load(parser("harvest", ""), argv)[0]


def speed(scratch: Path, options: list[str]) -> dict[str, float]:
    """Tokens per second of a whole harvest's windows and of the bare forward pass over them, and the median of
    their ratios: each bare pass comes right after its harvest, so that both see the machine in the same mood.
    """
    seconds: list[float] = []
    timed = run.run_windows

    def stopwatch(*args: object, **options: object) -> None:
        begun = time.perf_counter()
        timed(*args, **options)  # type: ignore[arg-type]
        seconds.append(time.perf_counter() - begun)

    run.run_windows = stopwatch  # type: ignore[assignment]
    model: lm.LanguageModel | None = None
    ours, bare = [], []
    try:
        for turn in range(TURNS):
            chosen = settings(*options, "--paths.activations", str(scratch / str(turn)))
            (path,) = run.harvest(chosen)
            store = Store.open(path)
            ours.append((len(store.train) + len(store.heldout)) / seconds[-1])
            if model is None:
                where = lm.locate(chosen.model)
                model = lm.load(chosen.model, where, lm.load_tokenizer(where, None))
            bare.append(
                forward_only(model, store.train.contexts, store.manifest.source.dropped_token_ids, chosen)
            )
    finally:
        run.run_windows = timed
    ratios = [a / b for a, b in zip(ours, bare, strict=True)]
    rates = {"harvest tokens/s": median(ours), "bare forward tokens/s": median(bare)}
    return rates | {"harvest / bare": median(ratios)}


def forward_only(model: lm.LanguageModel, contexts: Contexts, dropped: list[int], chosen: Settings) -> float:
    kept = Kept.count(contexts, dropped)
    rows = int(kept.before[-1])
    begun = time.perf_counter()
    for batch in kept.batches(range(rows), chosen.harvest.batch_size):
        model.run_blocks(torch.from_numpy(batch.tokens).long(), int(chosen.layer))
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return rows / (time.perf_counter() - begun)


def peak(command: list[str]) -> float:
    """Peak resident size of a command in GiB, as the kernel accounts it."""
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL, "
        "stderr=subprocess.DEVNULL); print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, *command], capture_output=True, encoding="utf-8", check=True
    )
    return int(process.stdout) / 2**20


def memory(scratch: Path) -> dict[str, float]:
    """GiB beyond the model: of 1, 4 and 8 layers, at one window and a bit; of one also at three times that."""
    model = save_wide_gemma(scratch / "gemma", layers=8, d_mlp=512)
    text = write_jsonl(scratch / "text.jsonl", sentences(9000, words=40))
    common = ["--model.name", str(model), "--data.files", str(text), "--data.pack", "concat"]
    common += ["--harvest.context_length", "64", "--model.device", "cpu", "--model.dtype", "bfloat16"]

    def of(layers: range, rows: int) -> float:
        where = ["--layer", " ".join(map(str, layers)), "--harvest.rows", str(rows)]
        with tempfile.TemporaryDirectory(dir=scratch) as activations:
            return peak(
                [sys.executable, "-m", "harvest", *common, *where, "--paths.activations", activations]
            )

    gibs = {}
    for layers, rows in (
        (range(7, 8), 40_000),
        (range(7, 8), 120_000),
        (range(4, 8), 40_000),
        (range(8), 40_000),
    ):
        what = f"GiB beyond the model, layers {len(layers)}, {rows:,} rows"
        gibs[what] = of(layers, rows) - of(layers, 4_000)
    return gibs


def main() -> None:
    options = argparse.ArgumentParser(description="Harvest against the bare forward pass.")
    options.add_argument("--only", choices=["speed", "memory"], help="one of both [both]")
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        demo = ["--profile", "demo", "--harvest.rows", str(WINDOWS * SHARD_ROWS)]
        results = {} if arguments.only == "memory" else speed(Path(scratch), demo)
        if arguments.only != "speed":
            results |= memory(Path(scratch))
    table = Table("what", "figure")
    for name, value in results.items():
        table.add_row(name, f"{value:,.3g}" if value < 100 else f"{value:,.0f}")
    Console().print(table)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

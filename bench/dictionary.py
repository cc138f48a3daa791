"""python -m bench.dictionary [--size 1.5e9]: memory of writing, loading, exporting and importing a large dictionary.

Each is done in a process of its own. Its own memory is RssAnon; its peak, VmHWM, counts mapped files too, which the
kernel drops where memory is short.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from common.hooks import hooks_of
from common.settings import ROOT
from tests.memory import resident
from transcoder import Transcoder, tensor_files, weights
from transcoder.export import exported
from transcoder.formats import WRITERS, circuit_tracer

D = 2304
HOOKS = dict(zip(("input_hook", "output_hook"), hooks_of(0, "normalized"), strict=True))
SOURCE = {"model": "bench/none", "layer": 0, "n_layers": 1, "input": "normalized", "gain": [1.5] * D, **HOOKS}


def write(folder: Path, size: float) -> None:
    """A dictionary of about `size` bytes, written by 16 slices of its latents."""
    n = int(size / 4 / 2 / D / 16)
    ends = (n, 16 * n)
    shapes = {
        "W_enc": (16 * n, D),
        "b_enc": (16 * n,),
        "W_dec": (16 * n, D),
        "b_dec": (D,),
        "thresholds": (2,),
    }
    weights.begin(folder, shapes, {"prefix_ends": ends, "source": SOURCE})
    for start in range(0, 16 * n, n):
        torch.manual_seed(start)
        for name in ("W_enc", "b_enc", "W_dec"):
            weights.put(folder, name, start, torch.randn(n, *shapes[name][1:]))
    weights.commit(folder)


def a_slice(folder: Path) -> None:
    """A sixteenth of the latents, as a rank loads it."""
    n = weights.read_metadata(folder)["prefix_ends"][0]
    assert Transcoder.load(folder, latents=slice(n, 2 * n)).d_sae == n


def export(run: Path, to: str) -> None:
    """As make export does, but for the folder."""
    reads = "mlp_in" if to == "gemma_scope_2" else "normalized"
    saved = exported(run, None, None, reads).saved()
    folder = run / to
    if to == "circuit_tracer":
        circuit_tracer.write(folder, [saved])
    else:
        WRITERS[to](folder, *saved)


def bring(run: Path, of: str) -> None:
    """As make import does, but for the store."""
    (file,) = (path for path in (run / of).rglob("*") if path.suffix in (".safetensors", ".npz"))
    Transcoder.load(file).save(run / "again")


def actions(run: Path, size: float) -> dict[str, Callable[[], None]]:
    formats = (*WRITERS, "circuit_tracer")
    return {
        "write by slices": lambda: write(run, size),
        "load a sixteenth": lambda: a_slice(run),
        "load and save": lambda: replace(Transcoder.load(run), metadata={}).save(run / "again"),
        **{f"export {each}": lambda to=each: export(run, to) for each in formats},
        **{f"import {each}": lambda of=each: bring(run, of) for each in formats},
    }


def one(action: Callable[[], None]) -> dict[str, float]:
    """Bytes and seconds that it takes; its own memory is beyond what the process had before."""
    before, begun = resident("RssAnon"), time.perf_counter()
    peak, ended = [before], threading.Event()

    def watch() -> None:
        while not ended.wait(0.005):
            peak[0] = max(peak[0], resident("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        action()
    finally:
        ended.set()
        watcher.join()
    return {"own": peak[0] - before, "peak": resident("VmHWM"), "seconds": time.perf_counter() - begun}


def of(name: str, folder: Path, size: float, block: int) -> dict[str, float]:
    """What one action takes, in a process of its own."""
    command = [sys.executable, "-m", "bench.dictionary", "--size", str(size), "--block", str(block)]
    command += ["--one", name, "--folder", str(folder)]
    process = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, encoding="utf-8", check=True
    )
    return json.loads(process.stdout)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--size", type=float, default=1.5e9, help="bytes of the dictionary")
    options.add_argument(
        "--block", type=int, default=tensor_files.BLOCK, help="bytes of rows that are held at once"
    )
    options.add_argument("--one", help=argparse.SUPPRESS)
    options.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = options.parse_args()
    tensor_files.BLOCK = asked.block
    if asked.one:
        print(json.dumps(one(actions(asked.folder, asked.size)[asked.one])))
        return
    title = f"{asked.size / 1e9:.3g} GB, blocks of {asked.block / 1e6:.0f} MB"
    table = Table("", "own memory, MB", "VmHWM, MB", "seconds", title=title)
    with tempfile.TemporaryDirectory() as folder:
        for name in actions(Path(), 0):
            found = of(name, Path(folder), asked.size, asked.block)
            memory = [f"{found[key] / 1e6:,.0f}" for key in ("own", "peak")]
            table.add_row(name, *memory, f"{found['seconds']:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()

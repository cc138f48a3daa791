"""python -m bench.soak --minutes 60: train, be killed at random instants, resume, evaluate; again and again.

One run without interruption is the reference. Every cycle trains and evaluates the same run in processes that are
killed (SIGKILL, SIGTERM, SIGINT) one to three times each, then once more inside this process, and compares every
file with the reference's, byte for byte (metrics.jsonl without its two timing fields; the weights' file by tensors
and metadata, because safetensors orders its header at random); then the store is verified.
The memory of this process, over the cycles, and of the trainings, at their peak, must not grow.
"""

import argparse
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from common.cli import load, parser
from common.files import sha256
from common.settings import ROOT, Settings
from evaluate.run import evaluate
from shards import Store
from shards.remote import LocalFiles
from shards.verify import verify
from tests.fixtures import make_store
from tests.memory import resident
from tests.train.runs import command, sparse_rows, tiny_settings
from train.loop import train
from transcoder import weights
from transcoder.weights import FILE_NAME

TIMING = ("rows_per_second", "data_wait_seconds", "peak_memory_bytes")
STEPS = 1000
SLOPE = 1.0
"""MB a cycle above which memory counts as growing."""
WARM = 2
"""First cycles, left out of the slope: caches fill."""
SIGNALS = {signal.SIGKILL: {-9}, signal.SIGTERM: {130, -15}, signal.SIGINT: {130, -2}}
"""Exit codes after each: negative ones before the stage has begun, when Python's own handlers are at work."""


@dataclass
class Cycle:
    seconds: float
    kills: list[str]
    """Stage, signal, seconds after its start."""
    own: float
    """MB of this process's own pages."""
    peak: float
    """MB that a training process had at most."""
    wrong: list[str] = field(default_factory=list)


@dataclass
class Soak:
    """The run, its commands by stage, its reference's directory."""

    settings: Settings
    root: Path

    @property
    def commands(self) -> dict[str, list[str]]:
        trained = command(self.settings)
        evaluated = [*trained[:2], "evaluate", *trained[3:], "--cross-entropy-tokens", "0"]
        return {"train": trained, "evaluate": evaluated}

    @property
    def reference(self) -> Path:
        return self.root / "reference"

    @property
    def store_path(self) -> Path:
        return Path(self.settings.store_path(0))


def prepared(root: Path, steps: int) -> Soak:
    """A store of 8,192 train rows, and the settings of a run of 64 latents on it."""
    paths = root / "activations", root / "checkpoints"
    wanted = tiny_settings(*paths, run="soak", train__rows=64 * steps, train__checkpoint_every=50)
    settings, _ = load(
        parser("train", ""), command(wanted)[3:]
    )  # what the processes are given, to the letter
    make_store(settings.store_path(0), sparse_rows(8192, 2), sparse_rows(1024, 3), storage="int8")
    return Soak(settings, root)


def run(soak: Soak, stage: str, kill: tuple[signal.Signals, float] | None = None) -> tuple[int, float, float]:
    """Start a stage; send the signal after so many seconds. Returns exit code, seconds, peak MB."""
    begun, peak = time.monotonic(), 0.0
    with (soak.root / "said").open("w", encoding="utf-8") as said:
        process = subprocess.Popen(soak.commands[stage], cwd=ROOT, stdout=said, stderr=said)
        while process.poll() is None:
            peak = max(peak, _peak(process.pid))
            if kill is not None and time.monotonic() - begun > kill[1]:
                process.send_signal(kill[0])
                process.wait(timeout=120)
                break
            time.sleep(0.02)
    code, allowed = process.wait(), {0} | (SIGNALS[kill[0]] if kill else set())
    if code not in allowed:
        raise AssertionError(
            f"{stage}: exit code {code}, expected {allowed}: {(soak.root / 'said').read_text(encoding='utf-8')}"
        )
    return code, time.monotonic() - begun, peak


def _peak(pid: int) -> float:
    """MB; 0 once the process has gone."""
    try:
        return resident("VmHWM", pid) / 2**20
    except (FileNotFoundError, ProcessLookupError, StopIteration):
        return 0.0


def interrupted(soak: Soak, stage: str, chance: random.Random, length: float) -> tuple[list[str], float]:
    """Run a stage to its end with kills on the way; returns them, and the peak MB of its processes."""
    kills, peaks = [], []
    for _ in range(chance.randint(1, 3)):
        number, after = chance.choice(list(SIGNALS)), chance.uniform(0.2, length)
        code, _, peak = run(soak, stage, (number, after))
        peaks.append(peak)
        if code == 0:
            break
        kills.append(f"{stage} {number.name} {after:.1f}")
    peaks.append(run(soak, stage)[2])
    return kills, max(peaks)


def differences(folder: Path, expected: Path) -> list[str]:
    """Files that one of the directories lacks or that differ, left-over ones too; timing fields do not count."""
    names = [{str(path.relative_to(root)) for path in root.rglob("*")} for root in (folder, expected)]
    wrong = [f"{name}: only in one" for name in sorted(names[0] ^ names[1])]
    for name in sorted(names[0] & names[1]):
        pair = folder / name, expected / name
        if pair[0].is_file() and _content(pair[0], folder) != _content(pair[1], expected):
            wrong.append(f"{name}: differs")
    return wrong


def _content(path: Path, run_dir: Path) -> object:
    if path.name == FILE_NAME:
        tensors, metadata = weights.read(path)
        return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}, metadata
    if path.name == "metrics.jsonl":
        lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        return [{key: value for key, value in line.items() if key not in TIMING} for line in lines]
    own = run_dir / FILE_NAME
    return path.read_bytes().replace(sha256(own).encode() if own.is_file() else b"weights", b"weights")


def cycle(soak: Soak, chance: random.Random, lengths: dict[str, float]) -> Cycle:
    begun, folder = time.monotonic(), soak.settings.run_dir()
    kills, peak = interrupted(soak, "train", chance, lengths["train"])
    more, _ = interrupted(soak, "evaluate", chance, lengths["evaluate"])
    wrong = [f"killed: {line}" for line in differences(folder, soak.reference)]
    shutil.rmtree(folder)
    with redirect_stderr(io.StringIO()):  # bars
        train(soak.settings, Store.of(soak.settings))
        evaluate(soak.settings, ce_tokens=0)
        wrong += [f"in this process: {line}" for line in differences(folder, soak.reference)]
        wrong += [f"store: {damage}" for damage in verify(LocalFiles(soak.store_path))]
    wrong += [f"store: left over: {path}" for path in soak.store_path.rglob("*.tmp")]
    shutil.rmtree(folder)
    return Cycle(time.monotonic() - begun, kills + more, resident("RssAnon") / 2**20, peak, wrong)


def slope(values: list[float]) -> float:
    """Theil-Sen: the median of the slopes of all pairs; 0 for fewer than two."""
    return median([(b - a) / (j - i) for (i, a), (j, b) in combinations(enumerate(values), 2)] or [0.0])


def soak(root: Path, seed: int, minutes: float, cycles: int | None = None, steps: int = STEPS) -> list[Cycle]:
    """Cycles for so many minutes, or so many cycles; at least one."""
    prepared_run, chance, begun = prepared(root, steps), random.Random(seed), time.monotonic()
    lengths = {stage: run(prepared_run, stage)[1] for stage in prepared_run.commands}
    prepared_run.settings.run_dir().rename(prepared_run.reference)
    cycles_run: list[Cycle] = []
    while not cycles_run or (len(cycles_run) < cycles if cycles else time.monotonic() - begun < 60 * minutes):
        cycles_run.append(cycle(prepared_run, chance, lengths))
        last = cycles_run[-1]
        print(
            f"cycle {len(cycles_run)}: {last.seconds:.1f} s, {last.own:.0f} MB, {', '.join(last.kills)}",
            flush=True,
        )
        print(*last.wrong, sep="\n", end="\n" if last.wrong else "", file=sys.stderr)
    return cycles_run


def verdict(cycles: list[Cycle]) -> tuple[Table, list[str]]:
    """The figures as a table, and what is wrong."""
    counted = cycles[WARM:]
    slopes = {
        "this process": slope([each.own for each in counted]),
        "trainings' peak": slope([each.peak for each in counted]),
    }
    table = Table("figure", "value")
    kills = [kill.split()[:2] for each in cycles for kill in each.kills]
    table.add_row("cycles, seconds a cycle", f"{len(cycles)}, {median(each.seconds for each in cycles):.1f}")
    for stage in ("train", "evaluate"):
        told = [f"{n.name} {sum(kill == [stage, n.name] for kill in kills)}" for n in SIGNALS]
        table.add_row(f"kills of {stage}", ", ".join(told))
    table.add_row("this process, MB", f"{cycles[0].own:.0f} first, {cycles[-1].own:.0f} last")
    table.add_row("trainings' peak, MB", f"{cycles[0].peak:.0f} first, {cycles[-1].peak:.0f} last")
    for name, value in slopes.items():
        table.add_row(f"{name}, MB a cycle", f"{value:+.3f} (limit {SLOPE})")
    wrong = [
        f"{name}: memory grows by {value:.2f} MB a cycle" for name, value in slopes.items() if value > SLOPE
    ]
    wrong = [line for each in cycles for line in each.wrong] + wrong
    table.add_row("files that differ from the reference's", str(sum(len(each.wrong) for each in cycles)))
    return table, wrong


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--minutes", type=float, default=60)
    options.add_argument("--seed", type=int, default=random.randrange(10**6), help="of signals and instants")
    arguments = options.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = (
        "1"  # the order of sums, and so the bytes, depend on the number of threads
    )
    with tempfile.TemporaryDirectory() as scratch:
        table, wrong = verdict(soak(Path(scratch), arguments.seed, arguments.minutes))
    Console().print(table)
    if wrong:
        print(*wrong, sep="\n", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()

"""Memory of a process, as the kernel accounts it; what is measured runs in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

from common.settings import ROOT

LOAD = """
import sys
from shards import Store
from tests.memory import resident

store = Store.open(sys.argv[1])
before = resident("RssAnon")  # mapped files are no part of it: they can be dropped at any time
print(max(resident("RssAnon") for _ in store.train.loader(1024)) - before)
"""

EVALUATE = """
import sys, threading
from common.cli import load, parser
from evaluate.run import evaluate
from tests.memory import resident

settings, _ = load(parser("evaluate", ""), sys.argv[1:])
peak, ended = [0], threading.Event()

def watch():
    while not ended.wait(0.005):
        peak[0] = max(peak[0], resident("RssAnon"))

watcher = threading.Thread(target=watch)
watcher.start()
evaluate(settings, ce_tokens=0)
ended.set()
watcher.join()
print(peak[0])
"""


def resident(field: str, process: int | str = "self") -> int:
    """Bytes of a field of /proc/<process>/status: RssAnon now, or VmHWM, the peak.

    VmHWM is this program's alone; ru_maxrss is inherited from the process that started it.
    """
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


def of_loader(store: str | Path) -> float:
    """MiB that an epoch's loader takes at most, batches of 1,024 rows."""
    return _measured(LOAD, str(store))


def of_evaluation(*arguments: str) -> float:
    """MiB that a process takes at most, mapped files apart, while it evaluates what the arguments say, without
    cross-entropy.
    """
    return _measured(EVALUATE, *arguments)


def _measured(script: str, *arguments: str) -> float:
    """One arena, and freed memory given back at once: with malloc's defaults two equal runs differ by up to 9 MiB."""
    malloc = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", script, *arguments]
    process = subprocess.run(
        command, cwd=ROOT, env=os.environ | malloc, capture_output=True, text=True, check=True
    )
    return int(process.stdout.split()[-1]) / 2**20

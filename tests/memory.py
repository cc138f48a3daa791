"""Memory of a process, as the kernel accounts it; what is measured runs in a process of its own."""

import subprocess
import sys
from pathlib import Path

from pipeline import ROOT

LOAD = """
import sys
from shards import Store
from tests.memory import resident

store = Store.open(sys.argv[1])
before = resident("RssAnon")  # mapped files are no part of it: they can be dropped at any time
print(max(resident("RssAnon") for _ in store.train.loader(1024)) - before)
"""


def resident(field: str) -> int:
    """Bytes of a field of /proc/self/status: RssAnon now, or VmHWM, the peak.

    VmHWM is this program's alone; ru_maxrss is inherited from the process that started it.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


def of_loader(store: str | Path) -> float:
    """MiB that an epoch's loader takes at most, batches of 1,024 rows."""
    command = [sys.executable, "-c", LOAD, str(store)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout) / 2**20

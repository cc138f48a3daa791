"""Memory of a process of its own; mapped files are no part of it, they can be dropped at any time."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
LOAD = """
import sys
from pathlib import Path
from shards import Store

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

store = Store.open(sys.argv[1])
before = anonymous()
print(max(anonymous() for _ in store.train.loader(1024)) - before)
"""


def of_loader(store: str | Path) -> float:
    """MiB that an epoch's loader takes at most, batches of 1,024 rows."""
    command = [sys.executable, "-c", LOAD, str(store)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout) / 1024

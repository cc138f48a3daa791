"""Memory that does not grow with the rows, and batches that are well mixed."""

import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.fixtures import make_store
from tests.shards.test_store import random_rows

ROOT = Path(__file__).parent.parent.parent
LOAD = """
import sys
from pathlib import Path
from shards import Store

def anonymous():  # mapped files can be dropped at any time: they are no part of it
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

store = Store.open(sys.argv[1])
before = anonymous()
print(max(anonymous() for _ in store.train.loader(1024)) - before)
"""


def test_the_loaders_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    grown = []
    for rows in (40_000, 240_000):
        path = make_store(
            tmp_path / f"{rows}.zarr", random_rows(rows, 64, 64), random_rows(1, 64, 64), "int8"
        ).path
        done = subprocess.run(
            [sys.executable, "-c", LOAD, path], cwd=ROOT, capture_output=True, text=True, check=True
        )
        grown.append(int(done.stdout) / 1024)
    assert grown[1] < grown[0] + 5  # MB, at six times the rows: 31 MB more of stored bytes


def test_batches_mix_like_independent_draws(tmp_path: Path) -> None:
    """Distinct contexts in a batch of 1,024, against draws from the whole split: at least 90 %."""
    store = make_store(
        tmp_path / "s.zarr", random_rows(400_000, 2, 2), random_rows(1, 2, 2), context_length=128
    )
    context = store.train.provenance(0, len(store.train))[0]
    batches = [len(np.unique(context[batch.rows])) for batch in store.train.loader(1024).batches()]
    rng = np.random.default_rng(0)
    drawn = [len(np.unique(context[rng.integers(0, len(context), 1024)])) for _ in range(50)]
    assert np.mean(batches) >= 0.9 * np.mean(drawn)

"""python -m bench.remote: how long training waits for the rows of a store in an object store.

The store lies in tests/objects.py's server, a process of its own on loopback, that answers late and fails 1 % of the
requests (503, 429, resets, bodies that end early). Training is a sleep for each batch, so that cores are left to loader
and server: at `--speed` rows a second, it waits for what the loader cannot do beside it. One pass with nothing in the
cache, and one with a cache of a quarter of the store; the local store is read the same way.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from common.files import size_of
from shards import Store
from shards.commit import read_commit
from shards.layout import SHARD_ROWS

BATCH = 1024
DELAYS = (5, 50, 200)
FAILING = 0.01


class Pass(NamedTuple):
    """One pass over the train rows."""

    first: float
    """Seconds to the first batch."""
    waiting: float
    """Share of the time after it that was spent waiting."""
    rows: float
    """Rows a second, of all the time."""


def serve(folder: Path, delay: float) -> None:
    """Serve a store as s3://bucket/store until standard input ends."""
    from tests.objects import Bucket, now_and_then
    from tests.servers import serving

    with serving(Bucket()) as server:
        for name in [*read_commit(folder), "files.sha256"]:
            server.objects[f"store/{name}"] = (folder / name).read_bytes()
        server.delay = delay
        server.fault = now_and_then(FAILING, "503", "429", "reset", "cut")
        print(server.url, flush=True)
        sys.stdin.read()
        print(server.sent, flush=True)


@contextmanager
def served(folder: Path, delay: float) -> Iterator[list[int]]:
    """The environment that leads to such a server; gives the bytes that it sent, at the end."""
    import pytest

    from tests.objects import environment

    command = [sys.executable, "-m", "bench.remote", "--serve", str(folder), "--delay", str(delay)]
    sent: list[int] = []
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8") as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        assert server.stdin
        assert server.stdout
        for name, value in environment(server.stdout.readline().strip()).items():
            patch.setenv(name, value)
        yield sent
        server.stdin.close()
        sent.append(int(server.stdout.read()))


def measure(store: Store, speed: float) -> Pass:
    """An epoch at `speed` rows a second, where the loader keeps up."""
    begun = time.perf_counter()
    first = waited = 0.0
    rows = 0
    batches = store.train.loader(BATCH, seed=0).batches()
    while True:
        asked = time.perf_counter()
        if (batch := next(batches, None)) is None:
            break
        here = time.perf_counter()
        if rows:
            waited += here - asked
        else:
            first = here - begun
        rows += len(batch.inputs)
        time.sleep(BATCH / speed)
    total = time.perf_counter() - begun
    return Pass(first, waited / (total - first), rows / total)


def make(folder: Path, windows: int, width: int) -> Path:
    from tests.fixtures import make_store

    rng = np.random.default_rng(0)
    rows = [rng.standard_normal((windows * SHARD_ROWS, width), np.float32) for _ in "xy"]
    few = rows[0][:1], rows[1][:1]
    return make_store(folder / "store", (rows[0], rows[1]), few, "int8").path


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options.add_argument("--delay", type=float, default=0.0, help=argparse.SUPPRESS)
    options.add_argument("--windows", type=int, default=6)
    options.add_argument("--width", type=int, default=256)
    options.add_argument("--speed", type=float, nargs="+", default=[20_000.0], help="rows a second")
    arguments = options.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.delay)
        return
    table = Table(
        "added latency", "cache", "speed asked", "rows/s", "first batch", "waiting", "downloaded / store"
    )
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        path = make(Path(scratch), arguments.windows, arguments.width)
        size = size_of(path)
        for speed in arguments.speed:
            local = measure(Store.open(path), speed)
            cases = [("local store", "", local, 0.0)]
            for delay in DELAYS:
                for name, limit in (("all", 10 * size), ("a quarter", size // 4)):
                    with (
                        served(path, delay / 1000) as sent,
                        tempfile.TemporaryDirectory(dir=scratch) as cache,
                    ):
                        done = measure(Store.open("s3://bucket/store", Path(cache), limit), speed)
                    cases.append((f"{delay} ms", name, done, sent[0] / size))
            for where, name, done, share in cases:
                table.add_row(
                    where, name, f"{speed:,.0f}", f"{done.rows:,.0f}", f"{done.first:.2f} s", f"{done.waiting:.1%}",
                    f"{share:.2f}" if share else "",
                )  # fmt: skip
                results.append(
                    {"where": where, "cache": name, "speed": speed, **done._asdict(), "downloaded": share}
                )
    Console().print(table)
    file = Path("bench/results/remote.json")
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

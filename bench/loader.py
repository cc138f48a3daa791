"""python -m bench.loader STORE: the loader against zarr-python and against memory, rows per second.

Batches of 1,024 rows, in turns in one process, medians; pinned to one core, then
the loader alone on two. What is compared gives the same float32 batches: same order, same scales.
Then the loader's peak memory at Gemma-2-2B's width, at two numbers of rows.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import numpy as np
import torch
import zarr
from rich.console import Console
from rich.table import Table

from shards import Store, StoreSplit
from shards.codecs import crc32c
from shards.layout import CHUNK_ROWS, FILE_CHUNKS
from shards.loader import SIDES
from shards.order import chunk_groups
from shards.reader import MappedArray
from tests.fixtures import make_store
from tests.memory import of_loader

BATCH, GROUP = 1024, 32
ROUNDS = 5
WIDTH, MEMORY_ROWS = 2304, (70_000, 140_000)


def ours(store: Store) -> int:
    """Three epochs: the first group that nothing overlaps is then a small part, as it is in training."""
    return sum(len(inputs) for inputs, _ in store.train.loader(BATCH, seed=0, epochs=3))


def batches_of(group: dict[str, np.ndarray]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Dequantised batches of one decoded int8 group, as the loader cuts them."""
    step = BATCH // GROUP
    for start in range(0, CHUNK_ROWS, step):
        cut = slice(start, start + step)
        pair = []
        for side in SIDES:
            values = torch.from_numpy(group[f"{side}s"][:, cut]).to(torch.float32)
            values *= torch.from_numpy(group[f"{side}_scales"])[:, None, :]
            values *= torch.from_numpy(group[f"{side}_row_scales"][:, cut])[:, :, None]
            values += torch.from_numpy(group[f"{side}_offsets"])[:, None, :]
            pair.append(values.reshape(BATCH, -1))
        yield pair[0], pair[1]


def over_zarr(store: Store, groups: int) -> int:
    """The same loop over zarr-python's own sharded arrays."""
    opened = zarr.open_group(store.path, mode="r")["train"]
    assert isinstance(opened, zarr.Group)
    names = [f"{side}{kind}" for side in SIDES for kind in ("s", "_row_scales")]
    rows = 0
    for chunks in chunk_groups(len(store.train) // CHUNK_ROWS, GROUP, 0, 0)[:groups]:
        read = {
            name: np.stack([_lines(opened, name, c * CHUNK_ROWS, CHUNK_ROWS) for c in chunks])
            for name in names
        }
        for side in SIDES:
            for name in (f"{side}_scales", f"{side}_offsets"):
                read[name] = np.stack([_lines(opened, name, c, 1)[0] for c in chunks])
        rows += sum(len(inputs) for inputs, _ in batches_of(read))
    return rows


def _lines(group: zarr.Group, name: str, start: int, count: int) -> np.ndarray:
    array = group[name]
    assert isinstance(array, zarr.Array)
    return np.asarray(array[start : start + count])


class InMemory:
    """crc + decode + dequantise of the same bytes, held in memory: what no reader of them can beat."""

    def __init__(self, split: StoreSplit, groups: int) -> None:
        self._groups = chunk_groups(len(split) // CHUNK_ROWS, GROUP, 0, 0)[:groups]
        names = [f"{side}{kind}" for side in SIDES for kind in ("s", "_row_scales", "_scales", "_offsets")]
        self._readers = {name: split.readers[name] for name in names}
        self._payloads = {
            (name, int(chunk)): _payload(reader, int(chunk))
            for name, reader in self._readers.items()
            for chunk in self._groups.ravel()
        }
        self._codecs = {name: reader.array.compressor.codec() for name, reader in self._readers.items()}
        shapes = {name: (GROUP, *reader.array.chunk) for name, reader in self._readers.items()}
        self._buffers = {
            name: np.empty(shapes[name], reader.array.dtype) for name, reader in self._readers.items()
        }

    def __call__(self) -> int:
        rows = 0
        for chunks in self._groups:
            for name, buffer in self._buffers.items():
                codec = self._codecs[name]
                assert codec
                for slot, chunk in enumerate(chunks):
                    payload = self._payloads[name, int(chunk)]
                    crc32c(payload)
                    codec.decode(payload, buffer[slot])
            group = {
                n: b[:, 0] if n.endswith(("_scales", "_offsets")) and "row" not in n else b
                for n, b in self._buffers.items()
            }
            rows += sum(len(inputs) for inputs, _ in batches_of(group))
        return rows


def _payload(reader: object, chunk: int) -> bytes:
    assert isinstance(reader, MappedArray)
    return reader._file(chunk // FILE_CHUNKS).payload(chunk % FILE_CHUNKS).tobytes()


def rate(run: Callable[[], int]) -> float:
    begun = time.perf_counter()
    return run() / (time.perf_counter() - begun)


def pin(cores: int) -> None:
    os.sched_setaffinity(0, sorted(ALL_CORES)[:cores])
    torch.set_num_threads(cores)


ALL_CORES = os.sched_getaffinity(0)


def memory(rows: int) -> float:
    """GiB of the loader over an int8 store of this many rows."""
    rng = np.random.default_rng(0)
    pair = (rng.standard_normal((rows, WIDTH), np.float32), rng.standard_normal((rows, WIDTH), np.float32))
    with tempfile.TemporaryDirectory() as scratch:
        small = make_store(f"{scratch}/s.zarr", pair, (pair[0][:1], pair[1][:1]), "int8")
        return of_loader(small.path) / 1024


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("store", type=Path)
    options.add_argument("--groups", type=int, default=12)
    arguments = options.parse_args()
    store = Store.open(arguments.store)
    groups = min(arguments.groups, len(store.train) // CHUNK_ROWS // GROUP)
    in_memory = InMemory(store.train, groups)
    contenders: dict[str, tuple[int, Callable[[], int]]] = {
        "loader": (1, lambda: ours(store)),
        "zarr-python, same loop": (1, lambda: over_zarr(store, groups)),
        "crc + decode + dequantise, in memory": (1, in_memory),
        "loader, two cores": (2, lambda: ours(store)),
    }
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, (cores, run) in contenders.items():
            pin(cores)
            rates[name].append(rate(run))
    base = median(rates["loader"])
    table = Table("what", "krows/s", "of the loader on one core")
    for name, speeds in rates.items():
        table.add_row(name, f"{median(speeds) / 1e3:,.0f}", f"{median(speeds) / base:.2f}")
    Console().print(table)
    gibs = {f"{rows:,} rows of width {WIDTH:,}": memory(rows) for rows in MEMORY_ROWS}
    for what, gib in gibs.items():
        Console().print(f"{what}: {gib:.2f} GiB")
    results = Path("bench/results/loader.json")
    results.parent.mkdir(exist_ok=True)
    summary = {name: median(rates[name]) for name in rates} | {"GiB": gibs}
    results.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

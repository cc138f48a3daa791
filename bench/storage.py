"""Storages and compressors on real activations: bytes a row, FVU cost, write and read speed of one core.

    make bench-storage

Arrays: inputs and outputs of one window, chunk by chunk as a store holds them.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from shards import Store
from shards.codecs import Compressor
from shards.encode import encode_rows, reduce_moments
from shards.layout import CHUNK_ROWS, Array
from shards.reader import MappedArray
from shards.remote import LocalFiles
from shards.storage import STORAGES

COMPRESSORS = (
    "none",
    "zstd-1",
    "zstd-3",
    "zstd-9",
    "blosc-zstd-3-shuffle",
    "blosc-zstd-3-bitshuffle",
    "blosc-lz4-5-shuffle",
    "blosc-lz4-5-bitshuffle",
)
REPEATS = 3


def arrays_of(side: str, storage: str, compressor: str, rows: int, width: int) -> dict[str, Array]:
    chosen = Compressor(compressor)
    plain = Compressor("zstd-3")
    chunks = -(-rows // CHUNK_ROWS)
    return {
        f"{side}s": Array(f"{side}s", (rows, width), STORAGES[storage].dtype, (CHUNK_ROWS, width), chosen),
        f"{side}_scales": Array(f"{side}_scales", (chunks, width), np.dtype("<f4"), (1, width), plain),
        f"{side}_offsets": Array(f"{side}_offsets", (chunks, width), np.dtype("<f4"), (1, width), plain),
        f"{side}_row_scales": Array(f"{side}_row_scales", (rows,), np.dtype("<f4"), (CHUNK_ROWS,), plain),
    }


def measure(values: np.ndarray, side: str, storage: str, compressor: str, scratch: Path) -> dict[str, Any]:
    """One row of the table; speeds are medians, in thousand rows a second."""
    arrays = arrays_of(side, storage, compressor, *values.shape)
    writes, reads = [], []
    files: dict[str, bytes] = {}
    sums: dict[str, Any] = {}
    for _ in range(REPEATS):
        begun = time.perf_counter()
        files, sums = encode_rows(values, STORAGES[storage], arrays, side)
        writes.append(len(values) / (time.perf_counter() - begun))
    for name, data in files.items():
        path = scratch / arrays[name].file(0)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    reader = MappedArray(LocalFiles(scratch), arrays[f"{side}s"])
    out = np.empty(reader.array.chunk, reader.array.dtype)
    for _ in range(REPEATS + 1):
        begun = time.perf_counter()
        for chunk in range(reader.array.chunks):
            reader.chunk(chunk, out)
        reads.append(len(values) / (time.perf_counter() - begun))
    moments = reduce_moments([sums])
    assert moments
    return {
        "array": f"{side}s",
        "storage": storage,
        "compressor": compressor,
        "bytes_per_row": sum(map(len, files.values())) / len(values),
        "of_bfloat16": sum(map(len, files.values())) / (2 * values.size),
        "fvu": moments.quantisation_fvu,
        "write_krows": median(writes) / 1e3,
        "read_krows": median(reads[1:]) / 1e3,
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_argument("store", type=Path, help="a float32 store")
    options.add_argument("--scratch", type=Path, default=Path("/dev/shm/bench-storage"))
    arguments = options.parse_args()
    store = Store.open(arguments.store)
    inputs, outputs = (tensor.numpy() for tensor in store.train.rows(0, min(len(store.train), 32_768)))
    table = Table(
        "array", "storage", "compressor", "bytes/row", "of bf16", "FVU", "write krows/s", "read krows/s"
    )
    rows = []
    for side, values in (("input", inputs), ("output", outputs)):
        for storage in STORAGES:
            for compressor in COMPRESSORS:
                row = measure(values, side, storage, compressor, arguments.scratch)
                rows.append(row)
                table.add_row(
                    *(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values())
                )
    Console().print(table)
    results = Path("bench/results/storage.json")
    results.parent.mkdir(exist_ok=True)
    results.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""A window's values -> the bytes of its files (zarr v3 sharding codec), and their sums.

Shapes: n rows of a window, d columns.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from shards.codecs import crc32c
from shards.layout import CHUNK_ROWS, FILE_CHUNKS, Array
from shards.manifest import Moments
from shards.storage import Encoded, Storage

CONSTANT = 1e-10
"""Share of a dimension's mean square up to which its variance is float32's rounding of one number (1e-5 of it)."""


Mapped = Callable[[Callable[[int], Any], Iterable[int]], Iterator[Any]]
"""`map`, or that of a pool of threads."""


class _Chunk(NamedTuple):
    encoded: Encoded
    total: np.ndarray
    """[d] float64 sum of each dimension"""
    squares: np.ndarray
    errors: np.ndarray
    """[d] float64 squared error of storing"""


def encode_rows(
    rows: np.ndarray, storage: Storage, arrays: dict[str, Array], side: str, mapped: Mapped = map
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """(files by array name, sums) of a window's rows [n, d] float32.

    Sums are float64, chunk by chunk in order: n; of each dimension sum, sum of squares, squared error of storing.
    `mapped` of a pool takes the chunks side by side; the bytes and the sums are the same.
    """

    def one(start: int) -> _Chunk:
        chunk = rows[start : start + CHUNK_ROWS]
        encoded = storage.encode(chunk)
        wide = chunk.astype(np.float64)
        errors = np.square(storage.decode(encoded) - chunk, dtype=np.float64).sum(axis=0)
        return _Chunk(encoded, wide.sum(axis=0), np.einsum("nd,nd->d", wide, wide), errors)

    stored = np.empty(rows.shape, storage.dtype)
    scales, offsets = np.empty((2, math.ceil(len(rows) / CHUNK_ROWS), rows.shape[1]), np.float32)
    row_scales = np.empty(len(rows), np.float32)
    total, squares, errors = np.zeros((3, rows.shape[1]))
    starts = range(0, len(rows), CHUNK_ROWS)
    for number, (start, chunk) in enumerate(zip(starts, mapped(one, starts), strict=True)):
        here = slice(start, start + CHUNK_ROWS)
        stored[here] = chunk.encoded.stored
        if storage.scaled:
            scales[number], row_scales[here], offsets[number] = chunk.encoded[1:]
        total += chunk.total
        squares += chunk.squares
        errors += chunk.errors
    files = {f"{side}s": encode_shard(arrays[f"{side}s"], stored, mapped)}
    if storage.scaled:
        files[f"{side}_scales"] = encode_shard(arrays[f"{side}_scales"], scales)
        files[f"{side}_offsets"] = encode_shard(arrays[f"{side}_offsets"], offsets)
        files[f"{side}_row_scales"] = encode_shard(arrays[f"{side}_row_scales"], row_scales)
    sums = {
        "n": len(rows),
        "sum": total.tolist(),
        "squares": squares.tolist(),
        "error": float(errors.sum()),
        "errors": errors.tolist(),
    }
    return files, sums


def encode_chunk(array: Array, values: np.ndarray) -> bytes:
    """The bytes of a chunk: `values`, padded with zeros to full shape and compressed, then their checksum."""
    full = np.ascontiguousarray(values, dtype=array.dtype)
    if full.shape != array.chunk:
        padded = np.zeros(array.chunk, array.dtype)
        padded[: len(full)] = full
        full = padded
    codec = array.compressor.codec()
    data = bytes(codec.encode(full)) if codec else full.tobytes()
    return data + crc32c(data)


def encode_shard(array: Array, values: np.ndarray, mapped: Mapped = map) -> bytes:
    """The bytes of a file: its chunks, the index of their (offset, length) pairs, its checksum (sharding codec 1.0)."""
    starts = range(0, len(values), array.chunk[0])
    # An absent chunk has both its numbers at their largest.
    index = np.full((FILE_CHUNKS, 2), np.iinfo("<u8").max, "<u8")
    parts: list[bytes] = []
    offset = 0
    chunks = mapped(lambda start: encode_chunk(array, values[start : start + array.chunk[0]]), starts)
    for number, chunk in enumerate(chunks):
        parts.append(chunk)
        index[number] = offset, len(parts[-1])
        offset += len(parts[-1])
    table = index.tobytes()
    return b"".join([*parts, table, crc32c(table)])


def reduce_moments(windows: list[dict[str, Any]]) -> Moments | None:
    """The moments of a split from the sums of its windows, added in their order; None if there are no rows."""
    rows = sum(sums["n"] for sums in windows)
    if rows == 0:
        return None
    total = sum((np.array(sums["sum"]) for sums in windows), start=np.zeros(1))
    squares = sum((np.array(sums["squares"]) for sums in windows), start=np.zeros(1))
    error = sum(sums["error"] for sums in windows)
    mean = total / rows
    variation = np.maximum(squares - rows * mean**2, 0)
    deviations = float(variation.sum())
    # None where an earlier version wrote one of the windows: it knew the sum alone.
    errors = sum((np.array(sums.get("errors", np.nan)) for sums in windows), start=np.zeros(1))
    varies = variation > CONSTANT * squares
    costs = np.divide(errors, variation, out=np.zeros_like(mean), where=varies)
    worst = int(costs.argmax())
    return Moments(
        mean=mean.tolist(),
        second_moment=(squares / rows).tolist(),
        quantisation_fvu=error / deviations if deviations > 0 else 0.0,
        worst_dimension=None if np.isnan(errors).any() else worst,
        worst_dimension_fvu=None if np.isnan(errors).any() else float(costs[worst]),
    )

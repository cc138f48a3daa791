"""A window's values -> the bytes of its files (zarr v3 sharding codec), and their sums.

Shapes: n rows of a window, d columns.
"""

import math
import mmap
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np

from shards.codecs import crc32c
from shards.layout import CHUNK_ROWS, FILE_CHUNKS, Array
from shards.manifest import Moments
from shards.storage import Encoded, Storage, column_squares, converted, from_bfloat16

CONSTANT = 1e-10
"""Share of a dimension's mean square up to which its variance is float32's rounding of one number (1e-5 of it)."""


Mapped = Callable[[Callable[[int], Any], Iterable[int]], Iterator[Any]]
"""`map`, or that of a pool of threads."""


class Column:
    """Values [n, d] of a window, in the precision that they were computed in; float32 where they are read.

    Of a norm's output before its gain, which is a 16-bit vector times one float32 number, both are held: 0.14 GiB at
    32,768 rows of width 2,304 in place of 0.28. Pages are the system's own (mmap): they come as rows are put, and go
    back as chunks are freed, so that two windows, one being filled and one being written, take little more than one.
    """

    def __init__(self, rows: int, width: int) -> None:
        self.shape = rows, width
        self._pages: mmap.mmap | None = None
        self._values: np.ndarray | None = None
        """[n, d] float32, float16, or uint16: the bits of bfloat16; the type of the first rows that were put."""
        self._scales: np.ndarray | None = None
        """[n] float32 that the rows are to be multiplied by."""

    def __len__(self) -> int:
        return self.shape[0]

    def put(self, places: np.ndarray, values: np.ndarray, scales: np.ndarray | None = None) -> None:
        """Rows [m, d] at `places` [m], in one of the three types; `scales` [m]: what they are multiplied by."""
        held = self._values
        if held is None:
            held = self._hold(values.dtype)
            self._scales = None if scales is None else np.ones(len(self), np.float32)
        if values.dtype != held.dtype or (scales is None) != (self._scales is None):
            held = self._widen()
            values, scales = _float32(values, scales), None
        held[places] = values
        if self._scales is not None and scales is not None:
            self._scales[places] = scales

    __setitem__ = put

    def __getitem__(self, rows: slice) -> np.ndarray:
        """[m, d] float32; a view where float32 is held."""
        assert self._values is not None, "rows are put before they are read"
        return _float32(self._values[rows], None if self._scales is None else self._scales[rows])

    def _hold(self, dtype: np.dtype) -> np.ndarray:
        """Zeros of this type in pages of their own; returned."""
        rows, width = self.shape
        # Private: of shared pages, as Python makes them, none would go back.
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._pages = mmap.mmap(-1, max(1, rows * width * dtype.itemsize), flags=private)
        self._values = np.frombuffer(self._pages, dtype, rows * width).reshape(self.shape)
        return self._values

    def _widen(self) -> np.ndarray:
        """Hold float32 from here on: rows of another type have come. Returns the values."""
        held, scales = self._values, self._scales
        assert held is not None
        wide = self._hold(np.dtype(np.float32))
        for start in range(0, len(self), CHUNK_ROWS):
            here = slice(start, start + CHUNK_ROWS)
            wide[here] = _float32(held[here], None if scales is None else scales[here])
        self._scales = None
        return wide

    def free(self, rows: slice) -> None:
        """Give the memory of these rows back; they are not read again."""
        if self._pages is None or self._values is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        line = self._values.strides[0]
        first = -(-rows.start * line // mmap.PAGESIZE) * mmap.PAGESIZE
        last = min(rows.stop, len(self)) * line // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:
            self._pages.madvise(mmap.MADV_DONTNEED, first, last - first)


def _float32(values: np.ndarray, scales: np.ndarray | None) -> np.ndarray:
    """Values as they were computed: of the bits of bfloat16, of float16, of float32."""
    wide = from_bfloat16(values) if values.dtype == np.uint16 else values.astype(np.float32, copy=False)
    return wide if scales is None else wide * scales[:, None]


class Measured(NamedTuple):
    """A chunk [n, d] as it is stored, and its sums. Arrays, or tensors where it was computed on a device."""

    encoded: Encoded
    total: Any
    """[d] float64 sum of each dimension"""
    squares: Any
    """[d] float64 sum of its squares"""
    errors: Any
    """[d] float64 squared error of storing"""


class Quantised(Protocol):
    """Rows that were quantised where the model runs."""

    shape: tuple[int, int]

    def __len__(self) -> int: ...

    def chunk(self, rows: slice) -> Measured:
        """A chunk of them."""
        ...


def measure(values: Any, storage: Storage) -> Measured:
    """A chunk [n, d] of float32 values, stored; on a device also chunks [c, n, d]."""
    encoded = storage.encode(values)
    wide = converted(values, "float64")
    total, squares = wide.sum(-2), column_squares(wide)
    difference = storage.decode(encoded)
    difference -= values
    if isinstance(values, np.ndarray):
        errors = np.square(difference, out=wide, dtype=np.float64).sum(axis=0)
    else:
        errors = wide.copy_(difference).square_().sum(-2)
    return Measured(encoded, total, squares, errors)


def encode_rows(
    rows: np.ndarray | Column | Quantised,
    storage: Storage,
    arrays: dict[str, Array],
    side: str,
    mapped: Mapped = map,
    done: Callable[[slice], object] = lambda _: None,
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """(files by array name, sums) of a window's rows [n, d] float32.

    Sums are float64, chunk by chunk in order: n; of each dimension sum, sum of squares, squared error of storing.
    Of rows that were quantised on a device, only their compression is left. `mapped` of a pool takes the chunks side by
    side; the bytes and the sums are the same. `done` is told of every chunk that will not be read again.
    """
    array = arrays[f"{side}s"]
    size = array.chunk[0]

    def one(start: int) -> tuple[bytes, Measured]:
        here = slice(start, start + size)
        chunk = measure(rows[here], storage) if isinstance(rows, np.ndarray | Column) else rows.chunk(here)
        data = encode_chunk(array, chunk.encoded.stored)
        done(here)
        return data, chunk._replace(encoded=chunk.encoded._replace(stored=None))

    scales, offsets = np.empty((2, math.ceil(len(rows) / size), rows.shape[1]), np.float32)
    row_scales = np.empty(len(rows), np.float32)
    total, squares, errors = np.zeros((3, rows.shape[1]))
    starts = range(0, len(rows), size)
    parts: list[bytes] = []
    for number, (start, (data, chunk)) in enumerate(zip(starts, mapped(one, starts), strict=True)):
        parts.append(data)
        if storage.scaled:
            scales[number], row_scales[start : start + size], offsets[number] = chunk.encoded[1:]
        total += chunk.total
        squares += chunk.squares
        errors += chunk.errors
    files = {f"{side}s": _shard(parts)}
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


def encode_shard(array: Array, values: np.ndarray) -> bytes:
    """The bytes of a file of these values."""
    starts = range(0, len(values), array.chunk[0])
    return _shard([encode_chunk(array, values[start : start + array.chunk[0]]) for start in starts])


def _shard(parts: list[bytes]) -> bytes:
    """A file: its chunks, the index of their (offset, length) pairs, its checksum (sharding codec 1.0)."""
    # An absent chunk has both its numbers at their largest.
    index = np.full((FILE_CHUNKS, 2), np.iinfo("<u8").max, "<u8")
    offset = 0
    for number, chunk in enumerate(parts):
        index[number] = offset, len(chunk)
        offset += len(chunk)
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

"""Values <-> what a store keeps of them: one entry of STORAGES for each value of harvest.storage.

Shapes: n rows of a chunk, d columns.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

LARGEST_BFLOAT16 = np.uint16(0x7F7F)


class Encoded(NamedTuple):
    """value = widened stored * scales * row_scales[:, None] + offsets, in float32, left to right; no scales count as
    ones, no offsets as zeros.
    """

    stored: np.ndarray
    """[n, d]"""
    scales: np.ndarray | None = None
    """[d] float32, one per column of this chunk"""
    row_scales: np.ndarray | None = None
    """[n] float32, size of each row beside the others, see `row_sizes`"""
    offsets: np.ndarray | None = None
    """[d] float32, each column's mean in this chunk"""


@dataclass(frozen=True)
class Storage:
    """One way to store values."""

    dtype: np.dtype
    """Of the stored values."""
    encode: Callable[[np.ndarray], Encoded]
    """A chunk of finite float32 values [n, d]."""
    widen: Callable[[np.ndarray], np.ndarray]
    """Stored values of any shape as fresh float32, before scales."""
    compressors: tuple[str, str]
    """Of inputs and outputs where harvest.compressor is auto: the measured best, docs/storage.md."""
    compressed: float
    """Bytes on disk per stored byte of real activations, SmolLM2-135M layer 12 (docs/storage.md)."""
    scaled: bool = False
    """Whether each chunk has column scales and offsets, and each row a scale, in arrays of their own."""
    torch_bits: str | None = None
    """The torch dtype whose bits the stored values are, where it is not that of the same name."""

    def decode(self, encoded: Encoded) -> np.ndarray:
        """[n, d] float32."""
        values = self.widen(encoded.stored)
        if encoded.scales is not None:
            values *= encoded.scales
        if encoded.row_scales is not None:
            values *= encoded.row_scales[:, None]
        if encoded.offsets is not None:
            values += encoded.offsets
        return values


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 -> upper 16 bits, rounded to nearest even, saturating; `values` must be finite."""
    bits = values.view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    sign = rounded & np.uint32(0x8000)
    magnitude = np.minimum(rounded & np.uint32(0x7FFF), np.uint32(LARGEST_BFLOAT16))
    return (sign | magnitude).astype("<u2")


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """uint16 bits -> float32 of the same shape, exact."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def column_offsets(values: np.ndarray) -> np.ndarray:
    """[d] float32 means of values [n, d] that are above one standard deviation; 0 for the others.

    A small mean costs nothing, and may be that of a few huge rows alone: taken off the small ones, it would drown them.
    """
    wide = values.astype(np.float64)
    mean = wide.mean(axis=0)
    wide -= mean
    variance = np.einsum("nd,nd->d", wide, wide) / len(wide)
    return np.where(np.square(mean) > variance, mean, 0).astype(np.float32)


def row_sizes(values: np.ndarray) -> np.ndarray:
    """[n] float32 root mean square of each row of values [n, d], each column in units of its own; 1 for a zero row.

    In all they have the mean square of the values. Columns are weighed alike: by the plain RMS a dimension 1e4 times
    the others decides alone, its small values make rows of the others huge, and their column scales with them: they
    lost 70 % of their variance, now 5e-5. The second round (Sinkhorn's) is for a row 1e4 times the others, which alone
    decides the first round's columns.

    einsum, not @: BLAS would start threads of its own in each of the threads that encode (docs/gpu.md). The sizes are
    the same.
    """
    squares = np.square(values, dtype=np.float64)
    rows = np.ones(len(values))
    for _ in range(2):
        columns = np.einsum("n,nd->d", _inverse(rows), squares)
        rows = np.einsum("nd,d->n", squares, _inverse(columns))
    rows *= squares.mean(axis=1).sum() / (rows.sum() or 1)
    sizes = np.minimum(np.sqrt(rows), np.finfo(np.float32).max).astype(np.float32)
    sizes[sizes == 0] = 1
    return sizes


def _inverse(sizes: np.ndarray) -> np.ndarray:
    """1 / size, 0 where there is none."""
    return np.divide(1, sizes, out=np.zeros_like(sizes), where=sizes > 0)


def quantise(values: np.ndarray) -> Encoded:
    """A chunk [n, d] of finite float32 values, below 2^127, as int8 with column offsets, and row size times column
    absmax scales.

    Row norms vary wildly in some models (median 513, maximum 8,564 in one layer of Gemma 3): dividing by
    the row's size first cuts the cost there from 5.6e-4 of the variance to 4.6e-5. Some dimensions have a mean of up
    to 114 standard deviations (Gemma-3-270M layer 3): without offsets 7 % of such a one's variance is lost, with them
    5e-4 at most.
    """
    offsets = column_offsets(values)
    steps = values - offsets
    row_scales = row_sizes(steps)
    steps /= row_scales[:, None]
    scales = np.maximum(steps.max(axis=0, initial=0), -steps.min(axis=0, initial=0)) / np.float32(127)
    steps /= np.where(scales == 0, np.float32(1), scales)
    np.clip(np.rint(steps, out=steps), -127, 127, out=steps)
    return Encoded(steps.astype(np.int8), scales, row_scales, offsets)


def _as_float32(stored: np.ndarray) -> np.ndarray:
    return stored.astype(np.float32)


FLOATS = ("blosc-zstd-3-bitshuffle", "blosc-zstd-3-shuffle")

STORAGES = {
    "int8": Storage(np.dtype("i1"), quantise, _as_float32, ("zstd-3", "zstd-3"), 0.91, scaled=True),
    "bfloat16": Storage(
        np.dtype("<u2"),
        lambda chunk: Encoded(to_bfloat16(chunk)),
        from_bfloat16,
        FLOATS,
        0.75,
        torch_bits="bfloat16",
    ),
    "float32": Storage(np.dtype("<f4"), Encoded, _as_float32, FLOATS, 0.89),
}
"""By name; `common.settings.Harvest.storage` lists the same names."""

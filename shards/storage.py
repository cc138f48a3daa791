"""Values <-> what a store keeps of them: one entry of STORAGES for each value of harvest.storage.

int8's arithmetic is written once, for numpy arrays, and for torch tensors on the device where the model runs; there
chunks may be stacked, [c, n, d]. numpy's bytes are those of the golden stores.

Shapes: n rows of a chunk, d columns.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

LARGEST_BFLOAT16 = np.uint16(0x7F7F)


class Encoded(NamedTuple):
    """value = widened stored * scales * row_scales[:, None] + offsets, in float32, left to right; no scales count as
    ones, no offsets as zeros.
    """

    stored: Any
    """[n, d], an array; a tensor where `quantise` was given one. The same of the others."""
    scales: Any = None
    """[d] float32, one per column of this chunk"""
    row_scales: Any = None
    """[n] float32, size of each row beside the others, see `row_sizes`"""
    offsets: Any = None
    """[d] float32, each column's mean in this chunk"""


@dataclass(frozen=True)
class Storage:
    """One way to store values."""

    dtype: np.dtype
    """Of the stored values."""
    encode: Callable[[Any], Encoded]
    """A chunk of finite float32 values [n, d]; where `scaled` also chunks [c, n, d] on a device."""
    widen: Callable[[Any], Any]
    """Stored values of any shape as fresh float32, before scales."""
    compressors: tuple[str, str]
    """Of inputs and outputs where harvest.compressor is auto: the measured best, docs/storage.md."""
    compressed: float
    """Bytes on disk per stored byte of real activations, SmolLM2-135M layer 12 (docs/storage.md)."""
    scaled: bool = False
    """Whether each chunk has column scales and offsets, and each row a scale, in arrays of their own."""
    torch_bits: str | None = None
    """The torch dtype whose bits the stored values are, where it is not that of the same name."""

    def decode(self, encoded: Encoded) -> Any:
        """[n, d] float32."""
        values = self.widen(encoded.stored)
        if encoded.scales is not None:
            values *= encoded.scales[..., None, :]
        if encoded.row_scales is not None:
            values *= encoded.row_scales[..., None]
        if encoded.offsets is not None:
            values += encoded.offsets[..., None, :]
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


def library(values: Any) -> ModuleType:
    """numpy or torch: whose functions take these values."""
    if isinstance(values, np.ndarray):
        return np
    import torch  # seconds; the tables of runs and stores, which have no tensors, do not wait for it

    return torch


def converted(values: Any, dtype: str) -> Any:
    """A copy in another type."""
    return (
        values.astype(dtype) if isinstance(values, np.ndarray) else values.to(getattr(library(values), dtype))
    )


def divided(values: Any, number: float) -> Any:
    """values / number, rounded once. By a number of the host a GPU multiplies with its rounded reciprocal instead."""
    return values / (number if isinstance(values, np.ndarray) else library(values).full_like(values, number))


def column_squares(wide: Any) -> Any:
    """[d] sums over the rows of values [n, d] squared, in their precision."""
    if isinstance(wide, np.ndarray):
        return np.einsum("nd,nd->d", wide, wide)
    return wide.square().sum(-2)  # torch's einsum would make [d] products of one row by one column


def column_offsets(values: Any) -> Any:
    """[d] float32 means of values [n, d] that are above one standard deviation; 0 for the others.

    A small mean costs nothing, and may be that of a few huge rows alone: taken off the small ones, it would drown them.
    """
    wide, n = converted(values, "float64"), values.shape[-2]
    mean = divided(wide.sum(-2), n)
    wide -= mean[..., None, :]
    variance = divided(column_squares(wide), n)
    xp = library(values)
    return converted(xp.where(xp.square(mean) > variance, mean, xp.zeros_like(mean)), "float32")


def row_sizes(values: Any) -> Any:
    """[n] float32 root mean square of each row of values [n, d], each column in units of its own; 1 for a zero row.

    In all they have the mean square of the values. Columns are weighed alike: by the plain RMS a dimension 1e4 times
    the others decides alone, its small values make rows of the others huge, and their column scales with them: they
    lost 70 % of their variance, now 5e-5. The second round (Sinkhorn's) is for a row 1e4 times the others, which alone
    decides the first round's columns.

    einsum, not @: numpy's would be BLAS, which starts threads of its own in each of the threads that encode
    (docs/gpu.md). The sizes are the same.
    """
    xp = library(values)
    squares = _squares(values)
    rows = xp.ones_like(squares[..., 0])
    for _ in range(2):
        columns = xp.einsum("...n,...nd->...d", _inverse(rows), squares)
        rows = xp.einsum("...nd,...d->...n", squares, _inverse(columns))
    total = rows.sum(-1)
    total = xp.where(total == 0, xp.ones_like(total), total)
    rows *= (divided(squares.sum(-1), values.shape[-1]).sum(-1) / total)[..., None]
    sizes = converted(xp.clip(xp.sqrt(rows), None, float(np.finfo(np.float32).max)), "float32")
    return xp.where(sizes == 0, xp.ones_like(sizes), sizes)


def _squares(values: Any) -> Any:
    """float64"""
    if isinstance(values, np.ndarray):
        return np.square(values, dtype=np.float64)  # without a second array
    return converted(values, "float64").square_()


def _inverse(sizes: Any) -> Any:
    """1 / size, 0 where there is none."""
    xp = library(sizes)
    there = sizes > 0
    one = xp.ones_like(sizes)
    return xp.where(there, one / xp.where(there, sizes, one), xp.zeros_like(sizes))


def _largest(values: Any) -> Any:
    """[d] largest size in each column of values [n, d]."""
    if isinstance(values, np.ndarray):
        return np.maximum(values.max(axis=0, initial=0), -values.min(axis=0, initial=0))
    least, most = values.aminmax(dim=-2)
    return library(values).where(
        most > -least, most, -least
    )  # of zeros -0.0, as numpy on x86; a GPU's maximum is +0.0


def quantise(values: Any) -> Encoded:
    """A chunk [n, d] of finite float32 values, below 2^127, as int8 with column offsets, and row size times column
    absmax scales.

    Row norms vary wildly in some models (median 513, maximum 8,564 in one layer of Gemma 3): dividing by
    the row's size first cuts the cost there from 5.6e-4 of the variance to 4.6e-5. Some dimensions have a mean of up
    to 114 standard deviations (Gemma-3-270M layer 3): without offsets 7 % of such a one's variance is lost, with them
    5e-4 at most.
    """
    xp = library(values)
    offsets = column_offsets(values)
    steps = values - offsets[..., None, :]
    row_scales = row_sizes(steps)
    steps /= row_scales[..., None]
    scales = divided(_largest(steps), 127)
    steps /= xp.where(scales == 0, xp.ones_like(scales), scales)[..., None, :]
    xp.clip(xp.round(steps, out=steps), -127, 127, out=steps)
    return Encoded(converted(steps, "int8"), scales, row_scales, offsets)


def _as_float32(stored: Any) -> Any:
    return converted(stored, "float32")


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

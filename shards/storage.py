"""Values <-> what a store keeps of them: one entry of STORAGES for each value of harvest.storage.

Shapes: n rows of a chunk, d columns.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

LARGEST_BFLOAT16 = np.uint16(0x7F7F)


class Encoded(NamedTuple):
    """value = widened stored * scales * row_scales[:, None], in float32, left to right; no scales count as ones."""

    stored: np.ndarray
    """[n, d]"""
    scales: np.ndarray | None = None
    """[d] float32, one per column of this chunk"""
    row_scales: np.ndarray | None = None
    """[n] float32, root mean square of each row"""


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
    """Whether each chunk has column scales and each row a scale, in arrays of their own."""
    torch_bits: str | None = None
    """The torch dtype whose bits the stored values are, where it is not that of the same name."""

    def decode(self, encoded: Encoded) -> np.ndarray:
        """[n, d] float32."""
        values = self.widen(encoded.stored)
        if encoded.scales is not None:
            values *= encoded.scales
        if encoded.row_scales is not None:
            values *= encoded.row_scales[:, None]
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


def quantise(values: np.ndarray) -> Encoded:
    """A chunk [n, d] of finite float32 values, below 2^127, as int8 with row RMS times column absmax scales.

    Row norms vary wildly in some models (median 513, maximum 8,564 in one layer of Gemma 3): dividing by
    the row's RMS first cuts the cost there from 5.6e-4 of the variance to 4.6e-5.
    """
    squares = np.einsum("nd,nd->n", values, values, dtype=np.float64)
    row_scales = np.sqrt(squares / values.shape[1]).astype(np.float32)
    row_scales[row_scales == 0] = 1
    steps = values / row_scales[:, None]
    scales = np.maximum(steps.max(axis=0, initial=0), -steps.min(axis=0, initial=0)) / np.float32(127)
    steps /= np.where(scales == 0, np.float32(1), scales)
    np.clip(np.rint(steps, out=steps), -127, 127, out=steps)
    return Encoded(steps.astype(np.int8), scales, row_scales)


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
"""By name; `pipeline.Harvest.storage` lists the same names."""

"""A file of delphi's cache: the firings of a range of latents, and the text of all.

The number of firings stands at the beginning of a safetensors file, so they wait in a file of their own until all are
known; neither is ever in memory whole. Shapes: n firings, C contexts of T tokens.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

import numpy as np

from shards.text.tokens import ContextTable

READ = 1 << 20
"""Firings, or tokens, that are in memory together."""
NAMES = {"<u2": "U16", "<u4": "U32", "<i4": "I32", "<f2": "F16", "<f4": "F32"}
"""numpy's types by their names in a safetensors header."""


class Split:
    """The file of latents [first, last]; `contexts`: how many are handed over."""

    def __init__(self, folder: Path, first: int, last: int, contexts: int) -> None:
        self.first, self.contexts = first, contexts
        self._path = folder / f"{first}_{last}.safetensors"
        small = contexts <= 1 << 16 and last - first < 1 << 16  # as delphi decides; positions are below 2^16
        self._waiting = self._path.with_suffix(".firings")
        self._record = np.dtype([("location", "<u2" if small else "<u4", 3), ("value", "<f4")])
        self._n, self._least, self._most = 0, math.inf, 0.0

    def __enter__(self) -> Self:
        self._file = self._waiting.open("w+b")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, context: np.ndarray, position: np.ndarray, latent: np.ndarray, value: np.ndarray) -> None:
        """Add firings, [n] each, in the order of the text."""
        if not len(value):
            return
        records = np.empty(len(value), self._record)
        for column, numbers in enumerate((context, position, latent - self.first)):
            records["location"][:, column] = numbers
        records["value"] = value
        self._file.write(records.tobytes())
        self._n += len(value)
        self._least, self._most = min(self._least, float(value.min())), max(self._most, float(value.max()))

    def finish(self, contexts: ContextTable, metadata: Mapping[str, str]) -> None:
        """Write the safetensors file and remove what waited; `metadata` goes into its header."""
        length = contexts.shape[1]
        tensors: dict[str, tuple[np.dtype, tuple[int, ...]]] = {
            "tokens": (np.dtype("<i4"), (self.contexts, length)),
            "locations": (self._record["location"].base, (self._n, 3)),
            "activations": (self._value_type(), (self._n,)),
        }
        order = sorted(tensors, key=lambda name: -tensors[name][0].itemsize)  # each at a multiple of its size
        with self._path.open("wb") as out:
            out.write(header({name: tensors[name] for name in order}, metadata))
            for name in order:
                if name == "tokens":
                    rows = max(READ // length, 1)
                    for start in range(0, self.contexts, rows):
                        numbers = np.arange(start, min(start + rows, self.contexts))
                        out.write(contexts[numbers].astype("<i4").tobytes())
                    continue
                for records in self._records():
                    column = records["location"] if name == "locations" else records["value"]
                    out.write(column.astype(tensors[name][0]).tobytes())
        self._file.close()
        self._waiting.unlink()

    def _value_type(self) -> np.dtype:
        """float16, as delphi writes, where it holds every value with its 11 bits; else float32, which delphi reads."""
        half = np.finfo(np.float16)
        fits = self._most <= float(half.max) and self._least >= float(half.smallest_normal)
        return np.dtype("<f2" if fits else "<f4")

    def _records(self) -> Iterator[np.ndarray]:
        self._file.seek(0)
        while data := self._file.read(READ * self._record.itemsize):
            yield np.frombuffer(data, self._record)


def header(tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file's beginning: its length, and JSON of each tensor's type, shape and place.

    >>> header({"a": (np.dtype("<f2"), (2,))}, {})
    b'H\\x00\\x00\\x00\\x00\\x00\\x00\\x00{"__metadata__":{},"a":{"dtype":"F16","shape":[2],"data_offsets":[0,4]}}'
    """
    described: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + dtype.itemsize * math.prod(shape)
        described[name] = {"dtype": NAMES[dtype.str], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text

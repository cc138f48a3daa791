"""Which arrays a split has, how they are chunked, and their zarr metadata.

The one description that the writer writes and the reader expects.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from shards.codecs import Compressor
from shards.manifest import SPLITS, Source
from shards.storage import STORAGES

CHUNK_ROWS = 1024
CHUNK_CONTEXTS = 16
FILE_CHUNKS = 32
"""Inner chunks of every file: a window of rows, its column scales, or 512 contexts."""
SHARD_ROWS = FILE_CHUNKS * CHUNK_ROWS
COMMIT = "files.sha256"
WORK = ".harvest"


@dataclass(frozen=True)
class Array:
    """One zarr array of a split: shard files of 32 inner chunks, cut along the first axis only."""

    path: str
    """Below the store, for example train/inputs."""
    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]
    compressor: Compressor

    @property
    def chunks(self) -> int:
        """Chunks that lie at least partly inside the shape."""
        return -(-self.shape[0] // self.chunk[0])

    def chunks_in_file(self, file: int) -> int:
        """Chunks of file number `file` that lie at least partly inside the shape."""
        return min(FILE_CHUNKS, self.chunks - file * FILE_CHUNKS)

    def file(self, number: int) -> str:
        """Path of file `number` below the store."""
        return "/".join([self.path, "c", str(number), *("0" for _ in self.shape[1:])])

    def metadata(self) -> dict[str, Any]:
        """The array's zarr.json (zarr core specification 3.1, sharding codec 1.0)."""
        little = {"name": "bytes", "configuration": {"endian": "little"}}
        to_bytes = little if self.dtype.itemsize > 1 else {"name": "bytes"}
        codecs = [to_bytes, *self.compressor.metadata(self.dtype.itemsize), {"name": "crc32c"}]
        shard = (FILE_CHUNKS * self.chunk[0], *self.chunk[1:])
        sharding = {
            "chunk_shape": list(self.chunk),
            "codecs": codecs,
            "index_codecs": [little, {"name": "crc32c"}],
            "index_location": "end",
        }
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": self.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(shard)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 0,
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "attributes": {},
            "storage_transformers": [],
        }


PLAIN = Compressor("zstd-3")


def split_arrays(source: Source, split: str, rows: int, contexts: int) -> dict[str, Array]:
    """Every array of a split, by name."""
    storage = STORAGES[source.storage]
    widths = {"input": source.d_in, "output": source.d_out}
    compressors = {"input": source.input_compressor, "output": source.output_compressor}
    chunks = -(-rows // CHUNK_ROWS)

    def by_row(name: str, dtype: Any, compressor: Compressor, *width: int) -> Array:
        return Array(f"{split}/{name}", (rows, *width), np.dtype(dtype), (CHUNK_ROWS, *width), compressor)

    arrays = {"contexts": contexts_array(split, contexts, source.context_length)}
    for side, width in widths.items():
        arrays[f"{side}s"] = by_row(f"{side}s", storage.dtype, Compressor(compressors[side]), width)
        if storage.scaled:
            for name in (f"{side}_scales", f"{side}_offsets")[: 1 + source.offsets]:
                arrays[name] = Array(f"{split}/{name}", (chunks, width), np.dtype("<f4"), (1, width), PLAIN)
            arrays[f"{side}_row_scales"] = by_row(f"{side}_row_scales", "<f4", PLAIN)
    arrays["row_context"] = by_row("row_context", "<u4", PLAIN)
    arrays["row_position"] = by_row("row_position", "<u2", PLAIN)
    return arrays


def contexts_array(split: str, contexts: int, context_length: int) -> Array:
    """[C, T] int32, a split's token ids."""
    chunk = (CHUNK_CONTEXTS, context_length)
    return Array(f"{split}/contexts", (contexts, context_length), np.dtype("<i4"), chunk, PLAIN)


def group_metadata(attributes: dict[str, Any] | None = None) -> dict[str, Any]:
    """A group's zarr.json (zarr core specification 3.1)."""
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes or {}}


def dumps(value: Any) -> bytes:
    """JSON as every metadata file of a store is written."""
    return (json.dumps(value, indent=1) + "\n").encode()


def windows(rows: int) -> list[range]:
    """Kept positions of each window of a split."""
    return [range(start, min(start + SHARD_ROWS, rows)) for start in range(0, rows, SHARD_ROWS)]


def kept_mask(contexts: np.ndarray, dropped_token_ids: Iterable[int]) -> np.ndarray:
    """[C, T] bool: positions that give a row. The first never does: its residual norm is 150 times the others'."""
    kept = ~np.isin(contexts, list(dropped_token_ids))
    kept[:, 0] = False
    return kept


def split_number(split: str) -> int:
    """The split's part of the key that orders its rows."""
    return SPLITS.index(split)

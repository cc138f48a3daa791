"""What a harvest will take, before it starts.

Estimates: stored bytes per raw byte were measured on real activations (docs/storage.md).
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from shards.codecs import STORED_DTYPE
from shards.layout import CHUNK_ROWS
from shards.manifest import Source

COMPRESSED = {"int8": 0.86, "bfloat16": 0.76, "float32": 0.88}
"""Bytes on disk per stored byte, SmolLM2-135M layer 12."""
BYTES_PER_ROW_OF_PROVENANCE = 3.5
"""row_context, row_position and the row's tokens, compressed."""


@dataclass(frozen=True)
class Plan:
    rows: int
    bytes_per_row: float
    free_bytes: int

    @property
    def bytes(self) -> int:
        return int(self.rows * self.bytes_per_row)

    @property
    def fits(self) -> bool:
        return self.bytes < self.free_bytes


def plan(source: Source, rows: int, where: Path) -> Plan:
    """Size of a store of `rows` rows in all, and what the disk at `where` has."""
    width = source.d_in + source.d_out
    stored = width * STORED_DTYPE[source.storage].itemsize * COMPRESSED[source.storage]
    scales = (4 * width / CHUNK_ROWS + 8) * (source.storage == "int8")
    existing = next(path for path in (where, *where.resolve().parents) if path.exists())
    return Plan(rows, stored + scales + BYTES_PER_ROW_OF_PROVENANCE, shutil.disk_usage(existing).free)


def human(size: float) -> str:
    """1234567 -> "1.2 MB" (powers of ten)."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"

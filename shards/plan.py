"""What a harvest will take on disk, before it starts and again once its first window is measured."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from shards.commit import store_files
from shards.layout import CHUNK_ROWS
from shards.storage import STORAGES
from shards.writer import StoreWriter

PROVENANCE = 3.5
"""Bytes a row for row_context, row_position and the row's own token, compressed."""
MANIFEST_BYTES_PER_DIMENSION = 22
"""One float64 as JSON; the manifest holds mean and second moment of two arrays in two splits."""


@dataclass(frozen=True)
class Plan:
    """What one store takes on disk, in bytes."""

    rows: int
    bytes_per_row: float
    fixed_bytes: int
    """Text, tokenizer, metadata: what does not grow with the windows still to come."""
    written_bytes: int
    """What of it is on disk already."""
    free_bytes: int
    measured: bool
    """Whether bytes_per_row is that of windows already written."""

    @property
    def bytes(self) -> int:
        """Of the whole store when it is complete."""
        return int(self.fixed_bytes + self.rows * self.bytes_per_row)

    @property
    def to_come(self) -> int:
        """What is still to be written."""
        return max(0, self.bytes - self.written_bytes)

    def __str__(self) -> str:
        how = "measured" if self.measured else "estimated"
        return (
            f"{self.rows:,} rows, {self.bytes_per_row:,.0f} bytes a row ({how}), "
            f"{human(self.bytes)} on disk, {human(self.free_bytes)} free"
        )


def estimate(width: int, storage: str, rows: int, where: Path) -> Plan:
    """Before anything is written; `width` is d_in + d_out, `rows` those of both splits."""
    size, free = _size(where), _free(where)
    return Plan(rows, bytes_per_row(width, storage), manifest_bytes(width), size, free, measured=False)


def bytes_per_row(width: int, storage: str) -> float:
    """Expected size of one row on disk."""
    kept = STORAGES[storage]
    stored = width * kept.dtype.itemsize * kept.compressed
    scales = 8 * width / CHUNK_ROWS + 8 if kept.scaled else 0
    return stored + scales + PROVENANCE


def manifest_bytes(width: int) -> int:
    """Mean and second moment of both arrays in both splits."""
    return 4 * width * MANIFEST_BYTES_PER_DIMENSION


def measure(writer: StoreWriter) -> Plan:
    """From the windows that are written; from an estimate while there are none."""
    rows, source = sum(writer.text.rows.values()), writer.source
    width = source.d_in + source.d_out
    records = [json.loads(path.read_bytes()) for path in sorted((writer.work / "records").glob("*.json"))]
    finished_rows = sum(record["rows"] for record in records)
    if finished_rows == 0:
        return estimate(width, source.storage, rows, writer.root)
    windows = {name for record in records for name in record["files"]}
    written = sum((writer.root / name).stat().st_size for name in windows)
    others = (
        writer.root / name for name in store_files(writer.root) if name not in windows and "/c/" not in name
    )
    text = (path for path in writer.root.glob("*/contexts/c/**/*") if path.is_file())
    fixed = sum(path.stat().st_size for path in [*others, *text]) + manifest_bytes(width)
    size, free = _size(writer.root), _free(writer.root)
    return Plan(rows, written / finished_rows, fixed, size, free, measured=True)


def _size(where: Path) -> int:
    return sum(path.stat().st_size for path in where.rglob("*") if path.suffix != ".tmp" and path.is_file())


def _free(where: Path) -> int:
    existing = next(path for path in (where, *where.resolve().parents) if path.exists())
    return shutil.disk_usage(existing).free


def human(size: float) -> str:
    """1234567 -> "1.23 MB" (powers of ten)."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def shortage(plans: list[Plan]) -> str | None:
    """What the stores of these plans, side by side on one disk, still need and do not find; none when they fit."""
    needed, free = sum(plan.to_come for plan in plans), plans[0].free_bytes
    return f"needs {human(needed)} more, {human(free)} are free" if needed > free else None

"""What a harvest will take on disk, before it starts and again once its first window is measured."""

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.files import size_of
from common.settings import Harvest
from shards.commit import store_files
from shards.layout import CHUNK_ROWS, SHARD_ROWS
from shards.manifest import read_manifest
from shards.remote import is_url
from shards.storage import STORAGES

if TYPE_CHECKING:  # it imports torch, which the tables do not wait for
    from shards.writer import StoreWriter

PROVENANCE = 3.5
"""Bytes a row for row_context, row_position and the row's own token, compressed."""
TOKEN = 2.0
"""Of these, the token's."""
RESERVE = 1 / 20
"""Share of the free disk that is left for runs and everybody else."""
MANIFEST_BYTES_PER_DIMENSION = 22
"""One float64 as JSON; the manifest holds mean and second moment of two arrays in two splits."""


@dataclass(frozen=True)
class Plan:
    """What one store takes on disk, in bytes."""

    rows: Mapping[str, int]
    """Of each split."""
    counted: bool
    """Whether the text was read; before, held-out rows are those to be expected."""
    bytes_per_row: float
    fixed_bytes: int
    """Text, tokenizer, metadata: what does not grow with the windows still to come."""
    written_bytes: int
    """What of it is on disk already."""
    free_bytes: int | None
    """None: where nobody says, in an object store."""
    measured: bool
    """Whether bytes_per_row is that of windows already written."""

    @property
    def bytes(self) -> int:
        """Of the whole store when it is complete."""
        return int(self.fixed_bytes + sum(self.rows.values()) * self.bytes_per_row)

    @property
    def kept(self) -> int:
        """Of the store when its train rows are removed: held-out rows and all text."""
        return int(self.fixed_bytes + self.rows["heldout"] * self.bytes_per_row + self.rows["train"] * TOKEN)

    @property
    def to_come(self) -> int:
        """What is still to be written."""
        return max(0, self.bytes - self.written_bytes)

    def __str__(self) -> str:
        how = "measured" if self.measured else "estimated"
        return (
            f"{rows_in_words(self.rows, self.counted)}, {self.bytes_per_row:,.0f} bytes a row ({how}), "
            f"{human(self.bytes)}{on_disk(self.free_bytes)}"
        )


def on_disk(free: int | None) -> str:
    """After a size: what the disk has left for it; nothing for an object store."""
    return "" if free is None else f" on disk, {human(free)} free"


def rows_in_words(rows: Mapping[str, int], counted: bool = True) -> str:
    """Rows of both splits, as every stage says them."""
    return f"{rows['train']:,} train + {'' if counted else 'about '}{rows['heldout']:,} held-out rows"


def expected_rows(harvest: Harvest) -> dict[str, int]:
    """Rows of both splits before the text is read: train rows as requested, held-out rows by their share."""
    return {"train": harvest.rows, "heldout": harvest.expected_rows - harvest.rows}


def bytes_per_row(width: int, storage: str) -> float:
    """Expected size of one row on disk."""
    kept = STORAGES[storage]
    stored = width * kept.dtype.itemsize * kept.compressed
    scales = 8 * width / CHUNK_ROWS + 8 if kept.scaled else 0
    return stored + scales + PROVENANCE


def manifest_bytes(width: int) -> int:
    """Mean and second moment of both arrays in both splits."""
    return 4 * width * MANIFEST_BYTES_PER_DIMENSION


def plan_of(
    writer: "StoreWriter", width: int, storage: str, expected: Mapping[str, int] | None = None
) -> Plan:
    """What a store takes: from its windows and its text as far as they are there, else as is to be expected.

    `width` is d_in + d_out; `expected`: rows of both splits where no text was read, or one that is read anew.
    """
    rows = writer.text.rows if expected is None else expected
    free = None if is_url(writer.where) else _free(writer.root)
    size, fixed, records = writer.size(), manifest_bytes(width), writer.records()
    finished_rows = sum(record["rows"] for record in records)
    if finished_rows == 0:
        per_row = bytes_per_row(width, storage)
        return Plan(rows, expected is None, per_row, fixed, size, free, measured=False)
    windows = {name for record in records for name in record["files"]}
    written = sum(writer.size_of_window(record) for record in records)
    others = (
        writer.root / name for name in store_files(writer.root) if name not in windows and "/c/" not in name
    )
    text = (path for path in writer.root.glob("*/contexts/c/**/*") if path.is_file())
    fixed += sum(path.stat().st_size for path in [*others, *text])
    return Plan(rows, expected is None, written / finished_rows, fixed, size, free, measured=True)


def measured(root: Path) -> float | None:
    """Bytes a row of a complete store's held-out rows, which stay when train rows are removed; none of too few."""
    rows = read_manifest(root).splits["heldout"].rows
    if rows < SHARD_ROWS:  # the last chunk's padding would count
        return None
    own = size_of(root / "heldout") - size_of(root / "heldout" / "contexts")
    return own / rows + TOKEN


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
    return (
        f"needs {human(needed)} more, {human(free)} are free" if free is not None and needed > free else None
    )


def room(disk_bytes: int | None, stores: Iterable[Path]) -> int:
    """Bytes that these stores may take together: `harvest.disk_bytes`, or what they take and most of what is free."""
    there = list(stores)
    most = sum(size_of(path) for path in there) + int(_free(there[0]) * (1 - RESERVE))
    return most if disk_bytes is None else min(disk_bytes, most)


def group(sizes: Mapping[int, int], room: int) -> list[int]:
    """The layers, in this order, whose whole stores fit into `room` bytes together."""
    chosen: list[int] = []
    for layer, size in sizes.items():
        if size <= room:
            chosen.append(layer)
            room -= size
    return chosen


@dataclass(frozen=True)
class Passes:
    """How the layers of a set are harvested in groups that the disk holds (harvest.keep layer)."""

    groups: list[list[int]]
    """A pass of the model each."""
    left: list[int]
    """Layers that do not fit beside what is kept of the others."""
    kept: int
    """Bytes that are kept of all."""


def passes(plans: Mapping[int, Plan], room: int) -> Passes:
    """The groups that `room` bytes allow; of a finished layer its held-out rows and its text are kept."""
    groups: list[list[int]] = []
    left, kept = dict(plans), 0
    while chosen := group({layer: plan.bytes for layer, plan in left.items()}, room - kept):
        groups.append(chosen)
        kept += sum(left.pop(layer).kept for layer in chosen)
    return Passes(groups, list(left), kept)

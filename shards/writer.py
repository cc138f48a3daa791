"""Rows -> shuffled, compressed, checksummed shards; commit last.

Window = shard = unit of work. A window's files appear whole, then its record in `.harvest/records`; when every
record is there, they are reduced in window order into the manifest, `files.sha256` is written, and `.harvest`
is removed. So a process killed at any instant loses at most the windows it was working on.

Shapes: n rows of a window, d columns.
"""

import contextlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import InputError, shown
from common.files import locked, remove_asides, sha256, size_of, write_whole
from shards.commit import commit_of, commit_text, store_files
from shards.device.column import DeviceColumn, Landing
from shards.encode import Column, Mapped, encode_rows, encode_shard, reduce_moments
from shards.layout import (
    COMMIT,
    WORK,
    contexts_array,
    dumps,
    group_metadata,
    split_arrays,
    split_number,
    windows,
)
from shards.manifest import NAMES, SPLITS, Manifest, Source, Split, digest, read_manifest
from shards.order import permutation
from shards.reader import Contexts, MappedArray
from shards.remote import LocalFiles
from shards.storage import STORAGES, Storage

VARIANCE_ROWS = 256
"""Rows of a window that tell a dimension's variance: in the few of a last one it may be small by chance."""


@dataclass(frozen=True)
class Text:
    """What the text pass left in a store: everything a harvest needs to run or to go on."""

    rows: dict[str, int]
    """Split -> kept positions."""
    contexts: dict[str, int]
    contexts_sha256: dict[str, str]
    tokenizer_sha256: str
    bad_rows: int = 0
    """Rows of the text that were skipped."""


class StoreWriter:
    """An unfinished store. `text` is there after the text pass, `missing()` says what is left to do."""

    def __init__(self, root: Path) -> None:
        self.root, self.where = root, str(root)
        self.work = root / WORK

    @property
    def complete(self) -> bool:
        """Whether the store is committed."""
        return (self.root / COMMIT).is_file()

    @contextlib.contextmanager
    def lock(self, leads: bool = True) -> Iterator[None]:
        """Hold the store; a second harvest is refused. The kernel frees a dead holder's lock. Of several processes one
        leads, and holds it for all.
        """
        if not leads:
            yield
            return
        with locked(self.work / "lock", f"{self.where}: another harvest is writing it"):
            try:
                yield
            finally:
                if self.complete:
                    shutil.rmtree(self.work)
                elif self.request is None:  # nothing that a later run could continue
                    shutil.rmtree(self.root)

    # -- text pass -------------------------------------------------------------------------------------

    @property
    def request(self) -> dict[str, Any] | None:
        """The settings the unfinished store was begun with; None before the text pass is complete."""
        begun = self._read_work("plan.json")
        return begun["request"] if begun else None

    def _read_work(self, name: str) -> Any:
        """A JSON file of the unfinished harvest, or None."""
        path = self.work / name
        return parsed(path.read_bytes(), path, self.where) if path.is_file() else None

    @property
    def has_rows(self) -> bool:
        """Whether there is a window that a later run would keep."""
        return self.complete or (self.work / "lost.json").is_file() or any(self.work.glob("records/*.json"))

    @property
    def beside(self) -> str:
        """What another setting needs beside itself where windows would be lost, as the end of a line of advice."""
        return " and HARVEST=name (windows of this one are written)" if self.has_rows else ""

    def forget(self) -> None:
        """Forget an unfinished harvest that has no window."""
        assert not self.has_rows
        for name in ("source.json", "plan.json"):
            (self.work / name).unlink(missing_ok=True)
        self.clear()

    def clear(self) -> None:
        """Remove what an interrupted text pass left (never a complete store)."""
        assert not self.complete
        for path in self.root.iterdir() if self.root.is_dir() else ():
            if path.name != WORK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.rmtree(self.work / "records", ignore_errors=True)

    def finish_text(self, request: dict[str, Any], text: Text) -> None:
        """The text pass is complete: from here on the dataset is never opened again."""
        write_whole(self.work / "plan.json", dumps({"request": request, "text": vars(text)}))

    @property
    def text(self) -> Text:
        """What the text pass left; only after it."""
        return Text(**self._read_work("plan.json")["text"])

    def fetch_text(self) -> None:
        """Have the contexts where `contexts` reads them: here, where they were written."""

    def contexts(self, split: str, context_length: int) -> Contexts:
        """[C, T] a split's token ids, as the text pass left them."""
        array = contexts_array(split, self.text.contexts[split], context_length)
        return Contexts(MappedArray(LocalFiles(self.root), array))

    # -- windows ---------------------------------------------------------------------------------------

    def begin(self, source: Source, create: bool = True) -> None:
        """Create every array's metadata at its final shape, or check that it was begun with the same source.

        Of several processes one creates.
        """
        self.source = source
        self._arrays = {s: split_arrays(source, s, self.text.rows[s], self.text.contexts[s]) for s in SPLITS}
        if (begun := self._read_work("source.json")) is not None:
            if differing := self.begun_otherwise(source):
                raise InputError(
                    f"{self.where}: begun with {differing}; finish it as it was begun, remove it, or give HARVEST=name"
                )
            # The model keeps the name it was begun with: the finished bytes do not depend on who goes on.
            names = {key: begun[key] for key in NAMES if key in begun}
            self.source = source.model_copy(update=names)
            return
        if create:
            self._write_metadata()
            write_whole(self.work / "source.json", dumps(source.model_dump()))

    def _write_metadata(self) -> None:
        for split, arrays in self._arrays.items():
            write_whole(self.root / split / "zarr.json", dumps(group_metadata()))
            for array in arrays.values():
                write_whole(self.root / array.path / "zarr.json", dumps(array.metadata()))

    def begun_otherwise(self, source: Source) -> str | None:
        """The first key in which the unfinished harvest was begun with another source, and both values."""
        if (theirs := self._read_work("source.json")) is None:
            return None
        ours = source.model_dump(exclude=set(NAMES))
        by_cause = sorted(ours, key="weights_sha256".__eq__)  # another precision changes the weights too
        for key in by_cause:
            if ours[key] != theirs.get(key):
                return f"{key} {shown(theirs.get(key))}, now {shown(ours[key])}"
        return None

    def missing(self) -> list[tuple[str, int]]:
        """(split, window) pairs that are still to be written, in order."""
        return [(s, w) for s, w in self._wanted() if not self._record_path(s, w).is_file()]

    def _wanted(self) -> list[tuple[str, int]]:
        """All windows, or those that were lost, where the others are committed."""
        wanted = [(s, w) for s in SPLITS for w in range(len(windows(self.text.rows[s])))]
        if (lost := self._read_work("lost.json")) is not None:
            wanted = [(s, w) for s, w in wanted if [s, w] in lost]
        return wanted

    def settle(
        self, during: Callable[[str], AbstractContextManager[None]] = lambda _: contextlib.nullcontext()
    ) -> None:
        """Until every window that was written is where it belongs: here it is."""

    def size(self) -> int:
        """Bytes of the store's files."""
        return size_of(self.root)

    def uncommit(self, lost: list[tuple[str, int]]) -> None:
        """Turn a complete store into an unfinished one that lacks these windows.

        The old commit is kept aside: the refilled windows must have the digests that it lists.
        """
        source, text = as_committed(self.manifest())
        with self.lock():
            shutil.rmtree(
                self.work / "records", ignore_errors=True
            )  # left of a harvest killed after its commit
            write_whole(self.work / "lost.json", dumps(lost))
            write_whole(self.work / "source.json", dumps(source))
            self.finish_text(source, text)
            (self.root / COMMIT).replace(self.work / COMMIT)

    def remove_rows(self) -> None:
        """Remove the train rows of a complete store: everything else stays, and the digests of what went.

        `files.sha256` says first that they are gone, in one rename. After a kill between that and the end the store is
        one without train rows, and what is left of their files goes with the next call.
        """
        with self.lock():
            commit = commit_of(self.root)
            removed = commit.removed | {name: d for name, d in commit.there.items() if _is_row(name)}
            if removed.keys() & commit.there.keys():
                there = {name: d for name, d in commit.there.items() if name not in removed}
                write_whole(self.root / COMMIT, commit_text(there, removed))
            for name in removed:
                (self.root / name).unlink(missing_ok=True)

    def manifest(self) -> Manifest:
        """Of a complete store."""
        return read_manifest(self.root)

    @property
    def removed(self) -> bool:
        """Whether it is complete, but without its train rows."""
        return self.complete and bool(commit_of(self.root).removed)

    def refill(self) -> None:
        """Turn a complete store without train rows into an unfinished one that lacks their windows."""
        rows = self.manifest().splits["train"].rows
        self.uncommit([("train", number) for number in range(len(windows(rows)))])

    def records(self) -> list[dict[str, Any]]:
        """Of the windows that are written."""
        return [json.loads(path.read_bytes()) for path in sorted((self.work / "records").glob("*.json"))]

    def size_of_window(self, record: dict[str, Any]) -> int:
        """Bytes of the files of a window that is written."""
        return sum((self.root / name).stat().st_size for name in record["files"])

    def _record_path(self, split: str, window: int) -> Path:
        return self.work / "records" / f"{split}-{window:06d}.json"

    def write_window(
        self,
        split: str,
        window: int,
        columns: "WindowRows",
        max_quantisation_fvu: float,
        max_dimension_fvu: float,
        mapped: Mapped = map,
        during: Callable[[str], AbstractContextManager[None]] = lambda _: contextlib.nullcontext(),
    ) -> None:
        """Compress and publish one window's rows, then its record. Called from background threads.

        `mapped`: see `encode_rows`. The rows' memory is given back as they are encoded. `during` is told what comes:
        "compression", "disk".

        Raises `InputError` when storing costs a larger share of the variance than `max_quantisation_fvu`, or a larger
        share of one dimension's own than `max_dimension_fvu`.
        """
        arrays = self._arrays[split]
        digests: dict[str, str] = {}
        moments: dict[str, dict[str, Any]] = {}

        def publish(name: str, data: bytes) -> None:
            path = arrays[name].file(window)
            digests[path] = write_whole(self.root / path, data)

        for side, rows in (("input", columns.inputs), ("output", columns.outputs)):
            done = partial(columns.let_go, rows)
            with during("compression"):
                files, sums = encode_rows(rows, STORAGES[self.source.storage], arrays, side, mapped, done)
            moments[f"{side}s"] = sums
            self._check_cost(side, sums, max_quantisation_fvu, max_dimension_fvu)
            with during("disk"):
                for name, data in files.items():
                    publish(name, data)
        with during("disk"):
            for name, values in (("row_context", columns.context), ("row_position", columns.position)):
                publish(name, encode_shard(arrays[name], values))
            record = {"rows": len(columns.inputs), "moments": moments, "files": digests}
            write_whole(self._record_path(split, window), dumps(record))

    def _check_cost(self, side: str, sums: dict[str, Any], limit: float, dimension_limit: float) -> None:
        moments = reduce_moments([sums])
        if moments is None:
            return
        what = f"{self.where}: storing the {side}s as {self.source.storage} costs"
        if not moments.quantisation_fvu <= limit:  # not a number: the difference of two values was infinite
            raise InputError(
                f"{what} FVU {moments.quantisation_fvu:.2g}, above harvest.max_quantisation_fvu {limit:g}; "
                f"give another harvest.storage{self.beside}, or raise the limit"
            )
        worst = moments.worst_dimension_fvu
        if worst is not None and worst > dimension_limit and sums["n"] >= VARIANCE_ROWS:
            raise InputError(
                f"{what} dimension {moments.worst_dimension} {worst:.2g} of its own variance, above "
                f"harvest.max_dimension_fvu {dimension_limit:g}; give another harvest.storage, or raise the limit"
            )

    def finish(self) -> Manifest:
        """Reduce the records into the manifest and commit."""
        assert not self.missing()
        remove_asides(self.root, *(path for path in self.root.rglob("*") if path.is_dir()))
        if (self.work / COMMIT).is_file():
            return self._recommit()
        text = self.text
        records = {s: [self._record(s, w) for w in range(len(windows(text.rows[s])))] for s in SPLITS}
        splits = {s: self._split(s, records[s]) for s in SPLITS}
        contexts = {s: text.contexts_sha256[s] for s in SPLITS}
        manifest = Manifest(
            source=self.source,
            fingerprint=digest([self.source.fingerprint, contexts]),
            tokenizer_sha256=text.tokenizer_sha256,
            bad_rows=text.bad_rows,
            splits=splits,
        )
        write_whole(self.root / "zarr.json", dumps(group_metadata({"manifest": manifest.to_json()})))
        digests = {
            path: d for split in records.values() for record in split for path, d in record["files"].items()
        }
        for path in store_files(self.root):
            if path not in digests:
                digests[path] = sha256(self.root / path)
        write_whole(self.root / COMMIT, commit_text(digests))
        return manifest

    def _recommit(self) -> Manifest:
        """Put the old commit back after the lost windows were refilled with the same bytes."""
        there, removed = commit_of(self.work)
        for record in self.records():
            for name, recorded in record["files"].items():
                expected = there[name] = removed.pop(name, None) or there[name]
                if expected != recorded:
                    raise InputError(
                        f"{self.where}/{name}: refilled with other bytes than were lost (sha256 expected "
                        f"{shown(expected)}, found {shown(recorded)}); remove the store and harvest again"
                    )
        write_whole(self.root / COMMIT, commit_text(there, removed))
        return read_manifest(self.root)

    def _record(self, split: str, window: int) -> dict[str, Any]:
        return json.loads(self._record_path(split, window).read_bytes())

    def _split(self, split: str, records: list[dict[str, Any]]) -> Split:
        text = self.text
        return Split(
            rows=text.rows[split],
            contexts=text.contexts[split],
            contexts_sha256=text.contexts_sha256[split],
            inputs=reduce_moments([record["moments"]["inputs"] for record in records]),
            outputs=reduce_moments([record["moments"]["outputs"] for record in records]),
        )


@dataclass
class WindowRows:
    """One window's rows in stored order; filled by the harvest, written by `StoreWriter.write_window`."""

    inputs: Column | DeviceColumn
    """[n, d_in]"""
    outputs: Column | DeviceColumn
    """[n, d_out]; of the same kind as the inputs"""
    context: np.ndarray
    """[n] uint32"""
    position: np.ndarray
    """[n] uint16"""
    freed: Callable[[int], object] = lambda _: None
    """Told how many rows of a column have been encoded, and given back."""

    def __post_init__(self) -> None:
        self._held, self._lock = 0, threading.Lock()

    @property
    def on_device(self) -> list[DeviceColumn]:
        """Both columns, or neither."""
        return [column for column in (self.inputs, self.outputs) if isinstance(column, DeviceColumn)]

    def quantise(self, storage: Storage) -> None:
        """Have the device quantise its rows; those on the host are quantised as they are written."""
        for column in self.on_device:
            column.quantise(storage)

    def fetch(self) -> None:
        """Have them copied to the host, where the layer's window before is not needed any more."""
        for column in self.on_device:
            column.fetch()

    def wait_computed(self) -> None:
        """Until the device has quantised them."""
        for column in self.on_device:
            column.wait_computed()

    def wait_copied(self) -> None:
        """Until they are on the host."""
        for column in self.on_device:
            column.wait_copied()

    def expect(self, rows: int) -> int:
        """Note that so many rows of both columns are put next; returns how many the host will hold of them together."""
        if self.on_device:
            return 0
        with self._lock:
            self._held += 2 * rows
        return 2 * rows

    @classmethod
    def empty(
        cls,
        rows: int,
        source: Source,
        freed: Callable[[int], object] = lambda _: None,
        landings: tuple[Landing, Landing] | None = None,
    ) -> "WindowRows":
        """Uninitialised columns for `rows` rows; on the device whose `landings` are given, of inputs and outputs."""
        if landings is None:
            inputs, outputs = Column(rows, source.d_in), Column(rows, source.d_out)
        else:
            inputs = DeviceColumn(rows, source.d_in, landings[0])
            outputs = DeviceColumn(rows, source.d_out, landings[1])
        return cls(
            inputs,
            outputs,
            np.empty(rows, np.uint32),
            np.empty(rows, np.uint16),
            freed,
        )

    def let_go(self, column: Column | DeviceColumn, rows: slice) -> None:
        """Give back rows of a column that are encoded."""
        if isinstance(column, DeviceColumn):
            return  # the next window comes to the same place
        column.free(rows)
        count = min(rows.stop, len(column)) - rows.start
        with self._lock:
            self._held -= count
        self.freed(count)

    def drop(self) -> None:
        """Give back whatever is still held."""
        with self._lock:
            count, self._held = self._held, 0
        self.freed(count)


def parsed(data: bytes, name: str | Path, store: str) -> Any:
    """The JSON of an unfinished harvest's file; raises `InputError` where it is none."""
    try:
        return json.loads(data)
    except ValueError as error:
        raise InputError(f"{name}: damaged ({error}); remove {store} and harvest again") from error


def as_committed(manifest: Manifest) -> tuple[dict[str, Any], Text]:
    """Source and text that a complete store was made of."""
    text = Text(
        rows={name: split.rows for name, split in manifest.splits.items()},
        contexts={name: split.contexts for name, split in manifest.splits.items()},
        contexts_sha256={name: split.contexts_sha256 for name, split in manifest.splits.items()},
        tokenizer_sha256=manifest.tokenizer_sha256,
        bad_rows=manifest.bad_rows,
    )
    return manifest.source.model_dump(), text


def stored_order(source: Source, split: str, window: int, rows: int) -> np.ndarray:
    """[rows] int64: where kept position i of the window goes."""
    return permutation(rows, source.seed, split_number(split), window)


def _is_row(name: str) -> bool:
    """Whether a file of a store holds train rows, or which token each is of; its text stays."""
    array, chunk, _ = name.partition("/c/")
    return bool(chunk) and array.startswith("train/") and array != "train/contexts"

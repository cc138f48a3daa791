"""Verified chunks of memory-mapped files; no shuffling.

The fast path reads exactly the layout that `layout.Array.metadata` describes. zarr-python reads an array with
other metadata (another codec chain, say), with a warning.
"""

import json
import mmap
import os
import threading
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from common.errors import InputError
from shards.codecs import crc32c
from shards.commit import rows_removed
from shards.layout import FILE_CHUNKS, Array
from shards.objects.client import TRIES
from shards.remote import Files, LocalFiles, RemoteFiles

CRC = 4
INDEX_BYTES = 16 * FILE_CHUNKS + CRC
CORE_CODECS = {"bytes", "zstd", "blosc", "gzip", "crc32c", "transpose", "sharding_indexed"}
"""Codecs that zarr-python may run on a store's bytes. Any package can register another, also one that unpickles."""
OPEN_FILES = 40
"""Maps kept open per array: the 32 chunks of a loader's group may be in 32 files."""


class DamagedChunkError(InputError):
    """A chunk whose bytes are missing or differ from those written; `what` is the message without the place."""

    def __init__(self, place: str, what: str) -> None:
        self.what = what
        super().__init__(f"{place}: {what}; make verify ARGS=--repair")


class ChunkReader(Protocol):
    """Verified chunks of one array."""

    array: Array

    def chunk(self, number: int, out: np.ndarray | None = None) -> np.ndarray:
        """Decoded chunk `number` at full chunk shape, written into `out` if it is not None.

        Rows of the last chunk beyond the array's shape are padding. Raises `InputError` with the file, the
        chunk and the rows if bytes are missing or damaged.
        """
        ...


def open_array(files: Files, array: Array) -> ChunkReader:
    """The fast reader if the array's metadata is that of this version, otherwise zarr-python's (local stores only)."""
    path = files.local(f"{array.path}/zarr.json")
    try:
        metadata = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    expected = array.metadata()
    for key in ("shape", "data_type"):
        if metadata.get(key) != expected[key]:
            raise InputError(f"{path}: {key}: expected {expected[key]}, found {metadata.get(key)}")
    if all(metadata.get(key) == expected[key] for key in ("chunk_grid", "chunk_key_encoding", "codecs")):
        return MappedArray(files, array)
    if not isinstance(files, LocalFiles):
        raise InputError(
            f"{files.where}/{array.path}: layout unknown to the fast reader; copy the store here"
        )
    if unknown := _codec_names(metadata.get("codecs")) - CORE_CODECS:
        raise InputError(
            f"{path}: codec {unknown.pop()}: expected those of zarr's core: {', '.join(sorted(CORE_CODECS))}"
        )
    warnings.warn(f"{path}: layout unknown to the fast reader, read through zarr-python", stacklevel=2)
    return ZarrArray(files.root, array)


def _codec_names(codecs: Any) -> set[str]:
    """Names of all codecs in a zarr.json's list and inside its shards; of an entry that is no codec, its repr."""
    names = set()
    for codec in codecs if isinstance(codecs, list) else [codecs]:
        names.add(str(codec.get("name")) if isinstance(codec, dict) else repr(codec))
        within = codec.get("configuration", {}) if isinstance(codec, dict) else {}
        for key in ("codecs", "index_codecs"):
            names |= _codec_names(within[key]) if key in within else set()
    return names


class MappedArray:
    """Chunks from memory-mapped files. Several threads may call it."""

    def __init__(self, files: Files, array: Array) -> None:
        self.array, self.files = array, files
        self._codec = array.compressor.codec()
        self._opened: OrderedDict[int, File] = OrderedDict()
        self._lock = threading.Lock()

    def chunk(self, number: int, out: np.ndarray | None = None) -> np.ndarray:
        array = self.array
        file_number, inner = divmod(number, FILE_CHUNKS)
        file = self._file(file_number)
        if out is None:
            out = np.empty(array.chunk, array.dtype)
        try:
            payload = file.payload(inner)
            if self._codec is not None:
                self._codec.decode(payload, out)
            elif len(payload) == out.nbytes:
                out.reshape(-1).view(np.uint8)[:] = payload
            else:
                raise ValueError(f"expected {out.nbytes} bytes, found {len(payload)}")
        except (ValueError, RuntimeError) as error:
            raise DamagedChunkError(f"{file.path}: {self._place(number)}", str(error)) from error
        return out

    def _place(self, number: int) -> str:
        first = number * self.array.chunk[0]
        last = min(first + self.array.chunk[0], self.array.shape[0]) - 1
        return f"chunk {number % FILE_CHUNKS} (lines {first} to {last} of {self.array.path})"

    def _payload(self, number: int) -> np.ndarray:
        return self._file(number // FILE_CHUNKS).payload(number % FILE_CHUNKS)

    def _file(self, number: int) -> "File":
        with self._lock:
            if file := self._opened.get(number):
                self._opened.move_to_end(number)
                return file
        file = self._open(self.array.file(number))  # a remote one may take its time
        with self._lock:
            self._opened[number] = file
            if len(self._opened) > OPEN_FILES:
                self._opened.popitem(last=False)  # closed when its last reader lets go
        return file

    def _open(self, name: str) -> "File":
        for attempt in range(TRIES):
            path = self.files.local(name)
            try:
                return File(path)
            except DamagedChunkError:
                # A full cache may have removed it again.
                if attempt == TRIES - 1 or path.exists() or not isinstance(self.files, RemoteFiles):
                    raise
        raise AssertionError


class File:
    """One mapped file. Its index is parsed once, its length checked before every chunk."""

    path: Path | str
    """What errors call it."""

    def __init__(self, path: Path, descriptor: int | None = None) -> None:
        """`descriptor`: of the file, where it is open already; it is closed with this."""
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY) if descriptor is None else descriptor
        except FileNotFoundError as error:  # no right to read it, or ulimit -n, is no damage
            raise DamagedChunkError(str(path), str(error.strerror)) from error
        self._size = os.fstat(self._fd).st_size
        if self._size < INDEX_BYTES:
            raise DamagedChunkError(str(path), f"expected at least {INDEX_BYTES} bytes, found {self._size}")
        try:
            self._map = np.frombuffer(mmap.mmap(self._fd, self._size, prot=mmap.PROT_READ), np.uint8)
        except OSError as error:  # names no file
            cannot = f"cannot be mapped into memory ({error.strerror}); copy the store to another disk"
            raise OSError(error.errno, cannot, str(path)) from error
        table, checksum = self._map[-INDEX_BYTES:-CRC], self._map[-CRC:]
        if crc32c(table) != checksum.tobytes():
            raise DamagedChunkError(str(path), "the chunk index's checksum does not match")
        self._index = np.frombuffer(table.tobytes(), "<u8").reshape(-1, 2)

    def payload(self, inner: int) -> np.ndarray:
        """A chunk's compressed bytes, after its checksum is verified. Raises `ValueError` that says what is wrong."""
        # Reading a mapping beyond the end of a shortened file kills the process with SIGBUS: check the length first.
        if (size := os.fstat(self._fd).st_size) != self._size:
            raise ValueError(f"the file's length changed from {self._size} to {size} bytes")
        offset, length = self.place(inner)
        data = self._map[offset : offset + length]
        if crc32c(data[:-CRC]) != data[-CRC:].tobytes():
            raise ValueError("checksum mismatch")
        return data[:-CRC]

    def place(self, inner: int) -> tuple[int, int]:
        """A chunk's offset and length, its checksum included. Raises `ValueError` where the file has no such bytes."""
        offset, length = (int(x) for x in self._index[inner])
        if length <= CRC or offset + length > self._size:
            raise ValueError(f"expected bytes {offset} to {offset + length} in a file of {self._size}")
        return offset, length

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)


class RemovedArray:
    """In place of the rows that were removed after training."""

    def __init__(self, files: Files, array: Array) -> None:
        self.array, self._where = array, files.where

    def chunk(self, number: int, out: np.ndarray | None = None) -> np.ndarray:
        raise rows_removed(self._where)


class ZarrArray:
    """The same chunks through zarr-python: the reference, and the reader of all other layouts."""

    def __init__(self, root: Path, array: Array) -> None:
        import zarr

        self.array = array
        opened = zarr.open_array(root / array.path, mode="r", zarr_format=3)
        assert isinstance(opened, zarr.Array)
        self._zarr = opened

    def chunk(self, number: int, out: np.ndarray | None = None) -> np.ndarray:
        rows = self.array.chunk[0]
        if out is None:
            out = np.empty(self.array.chunk, self.array.dtype)
        try:
            values = np.asarray(self._zarr[number * rows : (number + 1) * rows])
        except (ValueError, RuntimeError, OSError) as error:
            raise InputError(f"{self.array.path}: chunk {number}: {error}") from error
        out[: len(values)] = values
        out[len(values) :] = 0
        return out


def read_lines(reader: ChunkReader, lines: range) -> np.ndarray:
    """Lines of an array along its first axis, read chunk by chunk."""
    array, size = reader.array, reader.array.chunk[0]
    out = np.empty((len(lines), *array.shape[1:]), array.dtype)
    for chunk in range(lines.start // size, -(-lines.stop // size)):
        base = chunk * size
        first, last = max(base, lines.start), min(base + size, lines.stop)
        out[first - lines.start : last - lines.start] = reader.chunk(chunk)[first - base : last - base]
    return out


class Contexts:
    """[C, T] int32 token ids. The index is a number, a slice or an array of numbers."""

    def __init__(self, reader: ChunkReader) -> None:
        self._reader = reader
        self.shape = reader.array.shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> np.ndarray:
        numbers = np.atleast_1d(np.arange(len(self))[key])
        out = np.empty((len(numbers), self.shape[1]), np.int32)
        size = self._reader.array.chunk[0]
        for chunk in np.unique(numbers // size):
            here = numbers // size == chunk
            out[here] = self._reader.chunk(int(chunk))[numbers[here] - chunk * size]
        return out[0] if isinstance(key, int | np.integer) else out

"""Chunks of remote files, each fetched by itself: what the loader reads, chunk by chunk of all windows.

A whole file has 32 chunks, of which a group of the loader takes one. Where the cache holds less than the store, whole
files would be downloaded up to 32 times in an epoch; pieces are, once. They lie at their places in a file with holes,
beside the cache of whole files. Nothing notes which are there: a hole is what fails its checksum.
"""

import contextlib
import math
import os
from pathlib import Path

import numpy as np

from common.errors import InputError
from common.files import inside, make_folder
from shards.codecs import crc32c
from shards.layout import FILE_CHUNKS
from shards.objects.client import TRIES
from shards.reader import CRC, INDEX_BYTES, ChunkReader, DamagedChunkError, File, MappedArray
from shards.remote import RemoteFiles

WHOLE = 1024 * 1024
"""Files that are no larger come whole with their index: those of scales, at width 2,304."""


def in_pieces(reader: ChunkReader) -> ChunkReader:
    """A reader of the same chunks that fetches them one by one, where they are remote."""
    if isinstance(reader, MappedArray) and isinstance(reader.files, RemoteFiles):
        return StreamedArray(reader.files, reader.array)
    return reader


class StreamedArray(MappedArray):
    """Verified chunks, fetched when they are first read. Several threads may call it."""

    files: RemoteFiles

    def fetch(self, number: int) -> None:
        """Have a chunk here, so that `chunk` need not wait for it. Raises what that does."""
        try:
            self._payload(number)
        except InputError:
            raise
        except ValueError:  # of the chunk's bytes: `chunk` says where they are
            return

    def _open(self, name: str) -> File:
        path = inside(self.files.pieces, name)
        file = self._there(name, path)
        if file is None:
            most = FILE_CHUNKS * math.prod(self.array.chunk) * self.array.dtype.itemsize
            end = most + most // 100 + INDEX_BYTES if most <= WHOLE else INDEX_BYTES
            file = _InPieces(self.files, name, path, _begun(self.files, name, path, end))
        self.files.refuse_another()  # now that its index is read
        return file

    def _there(self, name: str, path: Path) -> File | None:
        """The file as far as it is in the cache; None where it is not, or a hole is at its end."""
        with contextlib.suppress(FileNotFoundError, DamagedChunkError):
            os.utime(path)
            return _InPieces(self.files, name, path, os.open(path, os.O_RDWR))
        return None


def _begun(files: RemoteFiles, name: str, path: Path, end: int) -> int:
    """The descriptor of a file of the size of the remote one, with its last `end` bytes, or its index alone where that
    is known: the cache was too small for the file.
    """
    data, size = files.ends.get(name) or _end(files, name, end)
    files.ends[name] = data[-INDEX_BYTES:], size
    make_folder(path.parent)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    os.ftruncate(descriptor, size)
    _write(descriptor, data, size - len(data), path)
    files.came(len(data), path)
    return descriptor


def _end(files: RemoteFiles, name: str, end: int) -> tuple[bytes, int]:
    """The last bytes of a file, its index among them, and its size."""
    for _ in range(TRIES):
        if (found := files.client.end(name, end)) is None:
            files.refuse_another()
            raise DamagedChunkError(f"{files.where}/{name}", "missing")
        if crc32c(np.frombuffer(found[0][-INDEX_BYTES:-CRC], np.uint8)) == found[0][-CRC:]:
            return found
    raise DamagedChunkError(f"{files.where}/{name}", "the chunk index's checksum does not match")


def _write(descriptor: int, data: bytes, offset: int, path: Path) -> None:
    view = memoryview(data)
    try:
        while view:
            done = os.pwrite(descriptor, view, offset)
            view, offset = view[done:], offset + done
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # pwrite() does not name its file


class _InPieces(File):
    """A mapped file with holes, which are filled when they are read."""

    def __init__(self, files: RemoteFiles, name: str, path: Path, descriptor: int) -> None:
        super().__init__(path, descriptor)
        self.path, self._cached = f"{files.where}/{name}", path
        self._files, self._name = files, name

    def payload(self, inner: int) -> np.ndarray:
        try:
            return super().payload(inner)
        except ValueError:
            offset, length = self.place(inner)
        for attempt in range(TRIES):
            if (data := self._files.client.piece(self._name, offset, offset + length)) is None:
                self._files.refuse_another()
                raise ValueError("missing")
            _write(self._fd, data, offset, self._cached)
            self._files.came(len(data), self._cached)
            try:
                return super().payload(inner)
            except ValueError:
                if attempt == TRIES - 1:
                    self._files.refuse_another()
                    raise
        raise AssertionError

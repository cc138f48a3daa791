"""safetensors files, written by rows and read through memory maps: neither takes the memory of a whole tensor.

A file is first made at its full size; then any process that sees the file system writes rows into their place. A tensor
that is read is a private map of its file: rows that are not used are not fetched, and the kernel may drop those that
were. safetensors' own maps for torch count as memory: Linux refuses to map a file larger than the machine's memory.
"""

import json
import mmap
import os
import struct
import sys
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.errors import InputError
from common.files import flush, make_folder, publish

BLOCK = 1 << 25
"""Bytes of rows that are copied to the host, converted or checked at once."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
UNRESERVED = 0x4000 if sys.platform == "linux" else 0
"""MAP_NORESERVE, which Python 3.11 has no name for."""


def blocks(tensor: Tensor) -> Iterator[Tensor]:
    """Views of a tensor's rows, about `BLOCK` bytes at a time."""
    row = max(tensor[:1].numel() * tensor.element_size(), 1)
    yield from tensor.split(max(BLOCK // row, 1))


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Each tensor's shape."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def size_of(shape: tuple[int, ...]) -> int:
    """Bytes of a float32 tensor."""
    return 4 * prod(shape)


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors in float32, whole: aside, flushed to disk, renamed. Of a view, only what it shows is written.

    The bytes are those of safetensors' `save_file`, but metadata are sorted by key; there they are in no order.
    """
    make_folder(path.parent)
    aside = path.with_name(path.name + ".tmp")
    try:
        create(aside, shapes_of(tensors), metadata)
        for name, tensor in tensors.items():
            put(aside, name, 0, tensor, flushed=False)
        publish(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def create(
    path: Path, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str] | None = None
) -> None:
    """Make a file of float32 tensors, all zero, at its full size. Replaces a file that was there before."""
    start = _header(shapes, metadata)
    try:
        with path.open("wb") as file:
            file.write(start)
            file.truncate(len(start) + sum(map(size_of, shapes.values())))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # write() does not name its file


def put(path: Path, name: str, start: int, rows: Tensor, flushed: bool = True) -> None:
    """Write `rows` as rows [start, start + len(rows)) of tensor `name`; if `flushed`, wait until they are on disk.

    Any process may call it, after `create`; rows of several processes must not overlap. Raises `ValueError` for rows
    that do not fit.
    """
    first, entries, _ = contents(path)
    shape, (begin, _) = tuple(entries[name]["shape"]), entries[name]["data_offsets"]
    if tuple(rows.shape[1:]) != shape[1:] or not 0 <= start <= start + len(rows) <= shape[0]:
        raise ValueError(f"{path}: {name} {list(shape)}: {list(rows.shape)} does not fit at row {start}")
    at = first + begin + start * size_of(shape[1:])
    descriptor = os.open(path, os.O_WRONLY)
    try:
        for offset, data in _pieces(rows.detach()):
            _write(descriptor, data, at + offset)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)
    if flushed:
        flush(path)


def turned(rows: Tensor) -> bool:
    """Whether this is the transpose of a contiguous matrix: its columns lie one after the other in memory."""
    return rows.ndim == 2 and not rows.is_contiguous() and rows.T.is_contiguous()


def _pieces(rows: Tensor) -> Iterator[tuple[int, memoryview]]:
    """(bytes from the start of the first row, data to write there). Reads `rows` once, in their order in memory."""
    if not turned(rows):
        at = 0
        for block in blocks(rows):
            data = _bytes(block)
            yield at, data
            at += len(data)
        return
    start, width = 0, 4 * rows.shape[1]
    for columns in blocks(rows.T):
        data, size = _bytes(columns.T), 4 * len(columns)
        for i in range(len(rows)):
            yield i * width + start, data[i * size : (i + 1) * size]
        start += size


def _bytes(rows: Tensor) -> memoryview:
    return rows.to("cpu", torch.float32).contiguous().numpy().reshape(-1).view(np.uint8).data


def _write(descriptor: int, data: memoryview, at: int) -> None:
    while len(data):
        written = os.pwrite(descriptor, data, at)
        data, at = data[written:], at + written


def set_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Replace the metadata of a file that `create` has made; the new ones must be as long as the old."""
    first, entries, _ = contents(path)
    start = _header({name: tuple(entry["shape"]) for name, entry in entries.items()}, metadata)
    if len(start) != first:
        raise ValueError(f"{path}: metadata of another length")
    with path.open("r+b") as file:
        file.write(start)


def contents(path: Path) -> tuple[int, dict[str, Any], dict[str, str]]:
    """(where the data begin, each tensor's entry, metadata) of a file known to be safetensors, finished or not."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        entries = json.loads(file.read(length))
    return 8 + length, entries, entries.pop("__metadata__", None) or {}


def _header(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str] | None) -> bytes:
    """The header of a file: safetensors sorts tensors of one dtype by name, and pads the header to 8 bytes."""
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in sorted(shapes):
        begin, end = end, end + size_of(shapes[name])
        entries[name] = {"dtype": "F32", "shape": list(shapes[name]), "data_offsets": [begin, end]}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def mapped(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a file. The tensors are maps of the file: a change to one stays in memory.

    Raises `InputError` for a file that safetensors cannot read.
    """
    try:
        with safe_open(path, framework="np") as file:
            names = file.keys()
        first, entries, metadata = contents(path)
        with path.open("rb") as file:
            data = mmap.mmap(
                file.fileno(), 0, mmap.MAP_PRIVATE | UNRESERVED, mmap.PROT_READ | mmap.PROT_WRITE
            )
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a readable safetensors file: {error}") from error
    return {name: _tensor(path, data, first, name, entries[name]) for name in names}, metadata


def _tensor(path: Path, data: mmap.mmap, first: int, name: str, entry: Mapping[str, Any]) -> Tensor:
    if entry["dtype"] not in DTYPES:
        raise InputError(f"{path}: tensor {name}: expected a dtype that PyTorch has, found {entry['dtype']}")
    dtype, shape, (begin, _) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    if not prod(shape):
        return torch.empty(shape, dtype=dtype)
    at, size = first + begin, prod(shape)
    if at % dtype.itemsize:  # a writer that does not pad its header
        return torch.frombuffer(data[at : at + size * dtype.itemsize], dtype=dtype).clone().view(shape)
    return torch.frombuffer(data, dtype=dtype, count=size, offset=at).view(shape)

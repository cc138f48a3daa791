"""Stored values <-> bytes in a file: compressors and checksums."""

import re
from dataclasses import dataclass
from typing import Any, Protocol

import google_crc32c
import numcodecs
import numcodecs.blosc
from numcodecs import Blosc, Zstd

from common.errors import InputError

# blosc-zstd with two threads gave 40 different outputs in 60 calls: a store's bytes must not depend on it.
numcodecs.blosc.use_threads = False


class Bytes(Protocol):
    """A numcodecs compressor."""

    def encode(self, buf: Any) -> Any: ...
    def decode(self, buf: Any, out: Any = None) -> Any: ...


@dataclass(frozen=True)
class Compressor:
    """One of zstd-N, blosc-zstd-N, blosc-lz4-N (both with -shuffle or -bitshuffle), none."""

    name: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"none|zstd-\d+|blosc-(zstd|lz4)-\d(-shuffle|-bitshuffle)?", self.name):
            raise InputError(
                f"harvest.compressor: expected auto, none, zstd-N, blosc-zstd-N or blosc-lz4-N "
                f"(with -shuffle or -bitshuffle), found {self.name!r}"
            )

    @property
    def _blosc(self) -> tuple[str, int, str]:
        _, library, level, *shuffle = self.name.split("-")
        return library, int(level), (shuffle or ["noshuffle"])[0]

    def codec(self) -> Bytes | None:
        """The numcodecs object that reads and writes a chunk's bytes; None stores them as they are."""
        if self.name == "none":
            return None
        if self.name.startswith("zstd"):
            return Zstd(level=int(self.name.split("-")[1]))
        library, level, shuffle = self._blosc
        mode = {"noshuffle": Blosc.NOSHUFFLE, "shuffle": Blosc.SHUFFLE, "bitshuffle": Blosc.BITSHUFFLE}[
            shuffle
        ]
        return Blosc(cname=library, clevel=level, shuffle=mode)

    def metadata(self, itemsize: int) -> list[dict[str, Any]]:
        """The zarr v3 codecs between `bytes` and `crc32c`."""
        if self.name == "none":
            return []
        if self.name.startswith("zstd"):
            return [
                {"name": "zstd", "configuration": {"level": int(self.name.split("-")[1]), "checksum": False}}
            ]
        library, level, shuffle = self._blosc
        configuration = {
            "cname": library,
            "clevel": level,
            "shuffle": shuffle,
            "typesize": itemsize,
            "blocksize": 0,
        }
        return [{"name": "blosc", "configuration": configuration}]


def crc32c(data: Any) -> bytes:
    """CRC-32C of a read-only buffer, as the four little-endian bytes that zarr appends."""
    return int(google_crc32c.value(data)).to_bytes(4, "little")

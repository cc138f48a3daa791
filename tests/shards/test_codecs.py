"""Compressors and checksums."""

import numpy as np
import pytest

from common.errors import InputError
from shards.codecs import Compressor, crc32c


def test_crc32c_check_value() -> None:
    assert crc32c(b"123456789") == (0xE3069283).to_bytes(
        4, "little"
    )  # RFC 3720's polynomial, check value of 1..9


@pytest.mark.parametrize(
    "name", ["none", "zstd-1", "zstd-9", "blosc-lz4-5", "blosc-zstd-3-shuffle", "blosc-lz4-5-bitshuffle"]
)
@pytest.mark.parametrize("dtype", ["i1", "<u2", "<f4"])
def test_compressors_round_trip(name: str, dtype: str) -> None:
    values = np.random.default_rng(0).integers(0, 100, (32, 7)).astype(dtype)
    codec = Compressor(name).codec()
    if codec is None:
        assert Compressor(name).metadata(values.itemsize) == []
        return
    out = np.empty_like(values)
    codec.decode(codec.encode(values), out)
    assert (out == values).all()


@pytest.mark.parametrize("name", ["gzip-3", "zstd", "blosc-zstd-3-sideways", ""])
def test_unknown_compressors_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"harvest\.compressor: expected auto, none, zstd-N"):
        Compressor(name)

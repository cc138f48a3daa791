import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline import InputError
from shards.codecs import Compressor, crc32c, dequantise, from_bfloat16, quantise, to_bfloat16

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
MATRICES = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=FINITE)


@given(MATRICES)
def test_bfloat16_equals_torch(values: np.ndarray) -> None:
    expected = torch.from_numpy(values).bfloat16().float()
    largest = torch.finfo(torch.bfloat16).max
    expected = expected.clamp(-largest, largest)  # ours saturates, torch's overflows to infinity
    assert torch.equal(torch.from_numpy(from_bfloat16(to_bfloat16(values))), expected)


def test_bfloat16_keeps_negatives_and_ties_go_to_even() -> None:
    values = np.array([-1.5, -0.0, 1.00390625, 1.01171875, -3.0e38], np.float32)
    assert from_bfloat16(to_bfloat16(values)).tolist()[:4] == [-1.5, -0.0, 1.0, 1.015625]


@given(MATRICES)
def test_int8_error_is_at_most_half_a_step(values: np.ndarray) -> None:
    quantised = quantise(values)
    with np.errstate(over="ignore"):
        error = np.abs(dequantise(*quantised).astype(np.float64) - values)
        step = quantised.scales.astype(np.float64) * quantised.row_scales.astype(np.float64)[:, None]
    # float32 products and denormals round on top of the half step
    slack = 1e-5 * np.abs(values).astype(np.float64) + 1e-5 * step + 1e-37
    assert (error <= step / 2 + slack).all()


def test_int8_by_hand() -> None:
    values = np.array([[3.0, -4.0], [0.0, 0.0], [-30.0, 40.0]], np.float32)
    quantised = quantise(values)
    rms = np.sqrt(12.5)
    assert quantised.row_scales == pytest.approx([rms, 1.0, 10 * rms])
    assert quantised.scales == pytest.approx([3 / rms / 127, 4 / rms / 127])
    assert quantised.stored.tolist() == [[127, -127], [0, 0], [-127, 127]]
    assert dequantise(*quantised) == pytest.approx(values, rel=1e-6)


def test_a_column_of_zeros_stays_zero() -> None:
    quantised = quantise(np.array([[1.0, 0.0], [2.0, 0.0]], np.float32))
    assert quantised.scales[1] == 0
    assert dequantise(*quantised)[:, 1].tolist() == [0.0, 0.0]


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

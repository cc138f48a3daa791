"""What storing keeps of a value, format by format."""

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from common.errors import InputError
from common.settings import Harvest
from shards.storage import STORAGES, from_bfloat16, quantise, to_bfloat16
from tests.fixtures import make_store

INT8 = STORAGES["int8"]
SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, max_side=9)
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
MATRICES = hnp.arrays(np.float32, SHAPES, elements=FINITE)
HALF = 2.0**127
"""Half of float32's range: within a rounding of its end, scales times steps may be infinite."""
BELOW_HALF = hnp.arrays(np.float32, SHAPES, elements=st.floats(-HALF, HALF, width=32))


@given(MATRICES)
def test_bfloat16_equals_torch(values: np.ndarray) -> None:
    expected = torch.from_numpy(values).bfloat16().float()
    largest = torch.finfo(torch.bfloat16).max
    expected = expected.clamp(-largest, largest)  # ours saturates, torch's overflows to infinity
    assert torch.equal(torch.from_numpy(from_bfloat16(to_bfloat16(values))), expected)


def test_bfloat16_keeps_negatives_and_ties_go_to_even() -> None:
    values = np.array([-1.5, -0.0, 1.00390625, 1.01171875, -3.0e38], np.float32)
    assert from_bfloat16(to_bfloat16(values)).tolist()[:4] == [-1.5, -0.0, 1.0, 1.015625]


@given(BELOW_HALF)
def test_int8_error_is_at_most_half_a_step(values: np.ndarray) -> None:
    quantised = quantise(values)
    with np.errstate(over="ignore"):
        error = np.abs(INT8.decode(quantised).astype(np.float64) - values)
        assert quantised.scales is not None
        assert quantised.row_scales is not None
        step = quantised.scales.astype(np.float64) * quantised.row_scales.astype(np.float64)[:, None]
        assert quantised.offsets is not None
    # float32 products and denormals round on top of the half step
    slack = 1e-5 * np.abs(values).astype(np.float64) + 1e-5 * step + 1e-37
    assert (error <= step / 2 + slack).all()


@given(BELOW_HALF)
def test_a_device_computes_the_hosts_int8(values: np.ndarray) -> None:
    """The same float32 operations, and float64 sums in another order: of small chunks they round to the same."""
    with np.errstate(over="ignore"):
        host, there = quantise(values), quantise(torch.from_numpy(values))
        stacked = quantise(torch.from_numpy(np.stack([values, values])))
        back = INT8.decode(host)
    assert torch.equal(INT8.decode(there), torch.from_numpy(back))
    for one, other, two in zip(host, there, stacked, strict=True):
        assert one.dtype == other.numpy().dtype
        assert np.array_equal(one, other.numpy())
        assert torch.equal(two[0], other)
        assert torch.equal(two[1], other)


def test_values_that_int8_cannot_hold_are_refused(tmp_path: Path) -> None:
    """At the very end of float32's range: their difference is infinite."""
    rows = np.full((9, 1), 3.3953585e38, np.float32)
    rows[0] = -rows[0]
    with np.errstate(all="ignore"):
        assert not np.isfinite(INT8.decode(quantise(rows))).all()
        with pytest.raises(InputError, match="storing the inputs as int8 costs FVU nan, above"):
            make_store(tmp_path / "layer_0.zarr", (rows, rows), (rows, rows), storage="int8")


def test_int8_by_hand() -> None:
    values = np.array([[3.0, -4.0], [-3.0, 4.0], [0.0, 0.0], [-30.0, 40.0], [30.0, -40.0]], np.float32)
    quantised = quantise(values + np.float32([0, 1000]))
    rms = np.sqrt(12.5)
    assert quantised.scales is not None
    assert quantised.offsets is not None
    assert quantised.offsets.tolist() == [0, 1000]  # a mean within one standard deviation is left in
    assert quantised.row_scales == pytest.approx([rms, rms, 1.0, 10 * rms, 10 * rms])
    assert quantised.scales == pytest.approx([3 / rms / 127, 4 / rms / 127])
    assert quantised.stored.tolist() == [[127, -127], [-127, 127], [0, 0], [-127, 127], [127, -127]]
    assert INT8.decode(quantised) - [0, 1000] == pytest.approx(values, abs=1e-4)


def test_a_constant_column_stays_what_it_is() -> None:
    quantised = quantise(np.array([[1.0, 0.0, 7.0], [2.0, 0.0, 7.0]], np.float32))
    assert quantised.scales is not None
    assert quantised.scales[1:].tolist() == [0, 0]
    assert INT8.decode(quantised)[:, 1:].tolist() == [[0.0, 7.0], [0.0, 7.0]]


def lost(values: np.ndarray) -> np.ndarray:
    """[d] share of each column's variance that int8 loses."""
    return np.square(INT8.decode(quantise(values)) - values).mean(0) / values.var(0)


@pytest.mark.parametrize("factor", [1e2, 1e4, 1e6])
def test_no_dimension_hides_the_others(factor: float) -> None:
    """A Gaussian cut at 3.3 sigma into 254 steps loses 5.5e-5 of its variance, whatever the units of its neighbours."""
    rows = np.random.default_rng(0).normal(size=(1024, 32)).astype(np.float32)
    large = rows * np.where(np.arange(32) == 3, np.float32(factor), 1)
    mean = rows + np.where(np.arange(32) == 3, np.float32(factor), 0)
    units = rows * np.exp(np.linspace(-9, 9, 32)).astype(np.float32)
    for values in (large, mean, units):
        if factor < 1e6 or values is not mean:  # there float32 itself has steps of a sixteenth
            assert lost(values).max() < 1e-4, factor
    several = (
        rows * np.where(np.arange(1024) == 7, np.float32(factor), 1)[:, None]
    )  # one row beside the dimension
    several[:, 3] *= factor
    others = np.arange(1024) != 7
    back = INT8.decode(quantise(several))
    assert (np.square(back - several)[others].mean(0) / several[others].var(0)).max() < 2e-4


@pytest.mark.parametrize("name", STORAGES)
@given(values=BELOW_HALF)
def test_every_format_keeps_shape_dtype_and_most_of_the_value(name: str, values: np.ndarray) -> None:
    storage = STORAGES[name]
    encoded = storage.encode(values)
    assert (encoded.stored.shape, encoded.stored.dtype) == (values.shape, storage.dtype)
    assert (encoded.scales is not None) == (encoded.row_scales is not None) == storage.scaled
    with np.errstate(over="ignore"):
        back = storage.decode(encoded)
    assert (back.shape, back.dtype) == (values.shape, np.float32)
    largest = np.abs(values).max()
    assert (np.abs(back.astype(np.float64) - values) <= largest / 100 + 1e-37).all()
    assert back is not encoded.stored  # a caller may change it


def test_the_settings_list_the_same_formats() -> None:
    assert get_args(Harvest.model_fields["storage"].annotation) == tuple(STORAGES)

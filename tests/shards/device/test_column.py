"""A window's side that is quantised on a device: the bytes of one that is quantised on the host, in few copies."""

import numpy as np
import pytest
import torch

from shards.device.column import DeviceColumn, Landing
from shards.device.copies import Copies
from shards.encode import Column, encode_rows
from shards.layout import CHUNK_ROWS, Array, split_arrays
from shards.storage import STORAGES
from tests.fixtures import make_source
from tests.pretend import DEVICE, pretend_device
from tests.shards.device.late import LateCopies

INT8 = STORAGES["int8"]
WIDTH = 24


def arrays_for(n: int) -> dict[str, Array]:
    source = make_source(
        WIDTH, WIDTH, n, storage="int8", input_compressor="zstd-3", output_compressor="zstd-3"
    )
    return split_arrays(source, "train", n, 1)


def rows_of(n: int, seed: int = 0) -> torch.Tensor:
    """Some large rows and dimensions, a mean, a row and a column of zeros."""
    rows = torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(seed))
    rows *= torch.exp(torch.randn(n, 1, generator=torch.Generator().manual_seed(seed + 1)))
    rows[:, 3] += 20
    rows[:, 4] *= 1e3
    rows[:, 5] = 0
    rows[n // 2] = 0
    return rows


def filled(landing: Landing, rows: torch.Tensor) -> DeviceColumn:
    """The rows in stored order, put in two parts, and quantised."""
    column = DeviceColumn(len(rows), WIDTH, landing)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(rows)))
    for part in order.split(len(rows) // 2 + 1):
        column.put(*(each.to(DEVICE, non_blocking=True) for each in (part, rows[part])))
    column.quantise(INT8)
    return column


def fetched(column: DeviceColumn) -> DeviceColumn:
    column.fetch()
    column.wait_computed()
    column.wait_copied()
    return column


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [2 * CHUNK_ROWS + 512, CHUNK_ROWS, 700])
def test_the_bytes_are_those_of_the_host(n: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, arrays = rows_of(n).to(dtype), arrays_for(n)
    host = Column(n, WIDTH)
    host.put(np.arange(n), rows.float().numpy())
    files, sums = encode_rows(host, INT8, arrays, "input")
    monkeypatch.setattr("shards.device.column.AT_ONCE", CHUNK_ROWS * WIDTH)  # one chunk at a time
    with pretend_device():
        apart = encode_rows(fetched(filled(Landing(Copies(DEVICE)), rows)), INT8, arrays, "input")
        monkeypatch.undo()
        together = encode_rows(fetched(filled(Landing(Copies(DEVICE)), rows)), INT8, arrays, "input")
    assert together == apart
    assert together[0] == files
    assert together[1].keys() == sums.keys()
    for name, expected in sums.items():  # float64, added in another order
        assert together[1][name] == pytest.approx(expected, rel=1e-12, abs=1e-9), name


def test_windows_take_turns_at_one_place_and_copies_may_be_late() -> None:
    with pretend_device():
        landing = Landing(LateCopies(DEVICE))
        for seed, n in enumerate((2 * CHUNK_ROWS, 2 * CHUNK_ROWS, 900)):
            rows, arrays = rows_of(n, seed), arrays_for(n)
            column = filled(landing, rows)
            expected = encode_rows(rows.numpy(), INT8, arrays, "output")
            assert encode_rows(fetched(column), INT8, arrays, "output")[0] == expected[0]


def test_int8_and_scales_come_to_the_host_and_nobody_waits() -> None:
    n, chunks = 3 * CHUNK_ROWS, 3
    with pretend_device() as counts:
        fetched(filled(Landing(Copies(DEVICE)), rows_of(n)))
        of_scales = 4 * n + 2 * 4 * chunks * WIDTH  # of rows, of columns, offsets
        of_sums = 3 * 8 * chunks * WIDTH + n  # three sums in float64, which rows are finite
        assert counts["bytes to host"] == n * WIDTH + of_scales + of_sums
        assert counts["copies to host"] == 6
        assert counts["waits"] == 0
        assert counts["copies to device"] == 4  # this test's own rows and places


def test_rows_that_are_not_finite_are_told() -> None:
    rows = rows_of(1500)
    with pretend_device():
        landing = Landing(Copies(DEVICE))
        assert len(fetched(filled(landing, rows)).unfinite()) == 0
        rows[7, 3], rows[1400, 0] = torch.nan, -torch.inf
        assert fetched(filled(landing, rows)).unfinite().tolist() == [7, 1400]

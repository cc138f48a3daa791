"""A window's rows in memory: held as they were computed, read as float32, given back chunk by chunk."""

import sys

import numpy as np
import pytest
import torch

from shards.encode import Column
from shards.layout import SHARD_ROWS
from tests.memory import resident


def bits(values: torch.Tensor) -> np.ndarray:
    return values.bfloat16().view(torch.int16).numpy().view(np.uint16)


def test_every_precision_is_read_as_it_was_put() -> None:
    values = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) * 300
    scales = torch.rand(40)
    places = np.random.default_rng(0).permutation(40)
    for held, factors, expected in (
        (values.numpy(), None, values),
        (values.half().numpy(), None, values.half().float()),
        (bits(values), None, values.bfloat16().float()),
        (bits(values), scales.numpy(), values.bfloat16().float() * scales[:, None]),
    ):
        column = Column(40, 6)
        for part in (slice(0, 25), slice(25, 40)):
            column.put(places[part], held[part], None if factors is None else factors[part])
        assert column[10:20].dtype == np.float32
        assert np.array_equal(column[:40], expected.numpy()[np.argsort(places)])


def test_rows_of_another_kind_widen_what_is_there() -> None:
    values = torch.randn(40, 6)
    first, rest, scales = np.arange(15), np.arange(15, 40), torch.rand(15)
    for held, factors, expected in (
        (bits(values[:15]), scales.numpy(), values[:15].bfloat16().float() * scales[:, None]),
        (bits(values[:15]), None, values[:15].bfloat16().float()),
    ):
        column = Column(40, 6)
        column.put(first, held, factors)
        column.put(rest, values[15:].numpy())
        assert np.array_equal(column[:15], expected.numpy())
        assert np.array_equal(column[15:40], values[15:].numpy())


@pytest.mark.skipif(sys.platform != "linux", reason="/proc, madvise")
def test_memory_comes_as_rows_are_put_and_goes_as_they_are_freed() -> None:
    """A window of 134 MB in bfloat16."""
    before = resident("RssAnon")
    column = Column(SHARD_ROWS, 2048)
    column.put(np.arange(0), np.zeros((0, 2048), np.uint16))
    assert resident("RssAnon") - before < 10e6
    column.put(np.arange(SHARD_ROWS), np.ones((SHARD_ROWS, 2048), np.uint16))
    full = resident("RssAnon") - before
    assert 130e6 < full < 150e6
    column.free(slice(0, SHARD_ROWS // 2))
    assert abs(full - 67e6 - (resident("RssAnon") - before)) < 5e6
    assert (column[SHARD_ROWS // 2 : SHARD_ROWS] > 0).all()

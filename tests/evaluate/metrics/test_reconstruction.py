"""Golden values by hand, brute force in numpy, and the degenerate cases."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluate.metrics.reconstruction import Reconstruction, Sparsity
from transcoder.entries import Entries
from transcoder.fvu import Deviation


def entries_of(counts: list[int], value: float = 1.0) -> Entries:
    rows = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    latents = torch.cat([torch.arange(count) for count in counts])
    return Entries(rows, latents, torch.full((len(rows),), value), len(counts))


def test_reconstruction_by_hand() -> None:
    y = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    y_hat = torch.tensor([[1.0, 1.0], [3.0, 2.0]])
    deviation, error = Deviation(2), Reconstruction(2)
    deviation.add(y)
    squared = error.add(y, y_hat)
    # mean (2, 2): deviations 1 + 4 + 1 + 4 = 10; squared errors 1 and 4
    assert deviation.total == 10.0
    assert squared.tolist() == [1.0, 4.0]
    result = error.result(deviation.total)
    assert result.fvu == pytest.approx(0.5)
    assert result.mse == pytest.approx(5 / 4)
    assert result.mae == pytest.approx(3 / 4)
    # cosines 1/sqrt(2) and (9 + 8) / (5 sqrt(13))
    assert result.cosine == pytest.approx((0.5**0.5 + 17 / (5 * 13**0.5)) / 2)
    # E||y_hat||^2 = 2 + 13, E<y, y_hat> = 1 + 17
    assert result.relative_bias == pytest.approx(15 / 18)


def test_perfect_and_mean_reconstructions() -> None:
    y = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)) + 5
    deviation, perfect, mean = Deviation(3), Reconstruction(3), Reconstruction(3)
    deviation.add(y)
    perfect.add(y, y)
    mean.add(y, y.double().mean(0).expand(50, 3))
    assert perfect.result(deviation.total).fvu == 0.0
    assert perfect.result(deviation.total).cosine == pytest.approx(1.0)
    assert perfect.result(deviation.total).relative_bias == pytest.approx(1.0)
    assert mean.result(deviation.total).fvu == pytest.approx(1.0, abs=1e-12)


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.integers(1, 5),
    st.floats(-1e4, 1e4),
    st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_blocks_of_any_size_equal_one_block(sizes: list[int], width: int, offset: float, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    y = torch.randn(sum(sizes), width, generator=draw) + offset
    y_hat = y + 0.1 * torch.randn(sum(sizes), width, generator=draw)
    deviation, error = Deviation(width), Reconstruction(width)
    for y_block, hat_block in zip(y.split(sizes), y_hat.split(sizes), strict=True):
        deviation.add(y_block)
        error.add(y_block, hat_block)
    wide, wide_hat = y.double().numpy(), y_hat.double().numpy()
    expected = ((wide - wide.mean(0)) ** 2).sum()
    assert deviation.total == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert float(error.squared.sum()) == pytest.approx(((wide - wide_hat) ** 2).sum(), rel=1e-9)
    cosines = (wide * wide_hat).sum(1) / np.linalg.norm(wide, axis=1) / np.linalg.norm(wide_hat, axis=1)
    assert error.result(1.0).cosine == pytest.approx(cosines.mean(), rel=1e-9)


def test_a_constant_dimension_adds_nothing_and_a_constant_output_has_no_fvu() -> None:
    y = torch.tensor([[0.1, 1.0], [0.1, 3.0], [0.1, 5.0]])
    deviation = Deviation(2)
    deviation.add(y[:2])
    deviation.add(y[2:])
    assert deviation.squares[0] == 0.0
    assert deviation.total == pytest.approx(8.0)
    constant, error = Deviation(1), Reconstruction(1)
    constant.add(y[:1, :1])
    constant.add(y[1:, :1])
    error.add(y[:, :1], y[:, 1:])
    assert error.result(constant.total).fvu is None


def test_one_row_has_no_fvu() -> None:
    deviation, error = Deviation(2), Reconstruction(2)
    deviation.add(torch.ones(1, 2))
    error.add(torch.ones(1, 2), torch.zeros(1, 2))
    expected = {"fvu": None, "mse": 1.0, "mae": 1.0, "cosine": 0.0, "relative_bias": None}
    assert error.result(deviation.total).written() == expected


def test_l0_by_hand() -> None:
    sparsity = Sparsity(12)
    sparsity.add(entries_of([0, 2, 2], value=0.5))
    sparsity.add(entries_of([5], value=2.0))
    result = sparsity.result()
    assert result.l0_histogram == [1, 0, 2, 0, 0, 1]
    assert result.l0 == pytest.approx(9 / 4)
    assert result.l0_median == 2.0
    assert result.l0_std == pytest.approx(np.std([0, 2, 2, 5]))
    assert result.l1 == pytest.approx((4 * 0.5 + 5 * 2.0) / 4)


@given(st.lists(st.integers(0, 12), min_size=1, max_size=30), st.integers(1, 29))
@settings(max_examples=80, deadline=None, derandomize=True)
def test_l0_equals_numpy(counts: list[int], cut: int) -> None:
    sparsity = Sparsity(12)
    for part in (counts[:cut], counts[cut:]):
        if part:
            sparsity.add(entries_of(part))
    result = sparsity.result()
    assert result.l0_median == np.median(counts)
    assert result.l0 == pytest.approx(np.mean(counts))
    assert result.l0_std == pytest.approx(np.std(counts), abs=1e-12)


def test_rows_without_an_active_latent_count_as_zero() -> None:
    sparsity = Sparsity(12)
    sparsity.add(entries_of([0, 0, 0]))
    assert sparsity.result().written() == {
        "l0": 0.0,
        "l0_median": 0.0,
        "l0_std": 0.0,
        "l0_histogram": [3],
        "l1": 0.0,
    }

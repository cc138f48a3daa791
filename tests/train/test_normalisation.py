"""The scales of the training space by hand."""

import numpy as np
import pytest
import torch

from shards.manifest import Moments
from train.normalisation import LEAST_VARIANCE, Scaling, input_scale


def moments(values: np.ndarray) -> Moments:
    return Moments(
        mean=values.mean(0).tolist(), second_moment=np.square(values).mean(0).tolist(), quantisation_fvu=0.0
    )


def test_dimensions_are_divided_by_the_root_of_their_deviation() -> None:
    scale = input_scale(np.array([1.0, 16.0, 81.0]))
    np.testing.assert_allclose(scale / scale[0], [1.0, 2.0, 3.0])  # std 1, 4, 9
    assert np.mean(np.array([1.0, 16.0, 81.0]) / scale**2) == pytest.approx(1.0)


def test_normalised_rows_have_a_mean_square_of_one_whatever_the_mean() -> None:
    rng = np.random.default_rng(0)
    deviations = rng.standard_normal((5000, 6)) * [0.1, 1, 2, 5, 20, 100]
    outputs = rng.standard_normal((5000, 3)) * [1, 2, 3]
    scalings = [
        Scaling.of(moments(deviations + shift), float(moments(outputs - 7 * shift).variance.sum()), 3)
        for shift in (0.0, 1000.0)
    ]
    for by, shift in zip(scalings, (0.0, 1000.0), strict=True):
        x = by.inputs(torch.tensor(deviations + shift, dtype=torch.float64))
        assert float(x.square().mean()) == pytest.approx(1.0, rel=1e-3)
        y = (outputs - outputs.mean(0)) / by.scale_out
        assert np.square(y).mean() == pytest.approx(1.0, rel=1e-6)
    torch.testing.assert_close(scalings[0].scale_in, scalings[1].scale_in, rtol=1e-4, atol=0)


def test_a_constant_dimension_is_not_blown_up() -> None:
    """It counts as one of the least variance that is looked at: a hundredth of the typical deviation."""
    scale = input_scale(np.array([1.0, 1.0, 0.0]))
    assert scale[2] / scale[0] == pytest.approx((LEAST_VARIANCE * 2 / 3) ** 0.25)
    assert np.isfinite(scale).all()


def test_rows_that_do_not_vary_are_left_as_they_are() -> None:
    constant = moments(np.full((10, 2), 3.0))
    by = Scaling.of(constant, 0.0, 2)
    assert by.scale_in.tolist() == [1.0, 1.0]
    assert by.scale_out == 1.0
    assert by.inputs(torch.full((1, 2), 3.0)).tolist() == [[0.0, 0.0]]

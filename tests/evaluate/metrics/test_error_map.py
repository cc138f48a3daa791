import numpy as np
import pytest
import torch

from evaluate.metrics.error_map import ErrorMap
from transcoder.heavy import Typical

EVERY = Typical(torch.zeros(1), limit=torch.inf, variance=1.0)
"""No row is heavy."""


def test_shares_add_up_and_equal_brute_force() -> None:
    rng = np.random.default_rng(0)
    y = rng.standard_normal((200, 3)) * rng.exponential(size=(200, 1))
    errors = rng.random((2, 200))
    tokens, positions = rng.integers(0, 6, 200), rng.integers(1, 16, 200)
    mean, variance = y.mean(0), y.var(0).sum()
    typical = Typical(torch.tensor([0.5, 0.0, -0.5]), limit=4.0, variance=1.0)
    error_map = ErrorMap(mean, variance, typical, n_prefixes=2, vocabulary=9, positions=16)
    for part in np.array_split(np.arange(200), 3):
        error_map.add(
            torch.from_numpy(y[part]), torch.from_numpy(errors[:, part]), tokens[part], positions[part]
        )
    squared = [torch.tensor([3.0, 1.0, 0.0]), torch.tensor([1.0, 2.0, 0.0])]
    result = error_map.result(squared, torch.tensor([4.0, 4.0, 0.0]), str)
    deviation = ((y - mean) ** 2).sum(1)
    assert len(result.by_token) == 6
    shares = [line.error_share for line in result.by_token]
    assert shares == sorted(shares, reverse=True)
    for line in result.by_token:
        own = tokens == line.class_
        assert line.rows == own.sum()
        assert line.error_share == pytest.approx(errors[1, own].sum() / errors[1].sum())
        assert line.fvu == pytest.approx([errors[g, own].sum() / deviation[own].sum() for g in range(2)])
    for kind in ("by_token", "by_position", "by_size"):
        assert sum(line.error_share for line in getattr(result, kind)) == pytest.approx(1.0)
        assert sum(line.rows for line in getattr(result, kind)) == 200
    distances = ((y - [0.5, 0.0, -0.5]) ** 2).sum(1)
    heavy = distances > 4
    assert result.heavy is not None
    assert (result.typical.rows, result.heavy.rows) == ((~heavy).sum(), heavy.sum())
    assert result.heavy_variance == pytest.approx(distances[heavy].sum() / distances.sum())
    for line, own in ((result.typical, ~heavy), (result.heavy, heavy)):
        assert line.fvu == pytest.approx([errors[g, own].sum() / distances[own].sum() for g in range(2)])
    assert [line.class_ for line in result.by_dimension] == [1, 0, 2]
    assert result.by_dimension[0].fvu == [0.25, 0.5]
    assert result.by_dimension[2].fvu == [None, None]


def test_position_edges_bound_their_bins() -> None:
    error_map = ErrorMap(np.zeros(1), 1.0, EVERY, n_prefixes=1, vocabulary=2, positions=100)
    edges = error_map.result([torch.ones(1)], torch.ones(1), str).position_edges
    for position in range(100):
        which = position * error_map.bins // 100
        assert edges[which] <= position < edges[which + 1]


def test_rows_of_any_size_have_a_bin_and_a_perfect_reconstruction_has_no_shares() -> None:
    error_map = ErrorMap(np.zeros(1), 1.0, EVERY, n_prefixes=1, vocabulary=1, positions=4)
    y = torch.tensor([[0.0], [1e-30], [1.0], [1e30]])
    error_map.add(y, torch.zeros(1, 4), np.zeros(4, int), np.arange(4))
    result = error_map.result([torch.zeros(1)], torch.ones(1), str)
    assert sum(line.rows for line in result.by_size) == 4
    assert result.by_token[0].error_share is None
    assert result.heavy is None
    assert result.heavy_variance == 0

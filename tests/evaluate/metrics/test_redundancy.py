import numpy as np
import pytest
import torch

from evaluate.metrics import redundancy
from evaluate.metrics.redundancy import decoder_similarity


@pytest.mark.parametrize(("block", "tile"), [(1, 1000), (4, 1000), (1000, 1000), (4, 8), (4, 7), (1000, 3)])
def test_redundancy_equals_a_brute_force_count(
    block: int, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redundancy, "BLOCK", block)
    monkeypatch.setattr(redundancy, "TILE", tile)
    draw = torch.Generator().manual_seed(0)
    W = torch.randn(23, 3, generator=draw) * torch.rand(23, 1, generator=draw)
    summary, neighbours = decoder_similarity(W, (5, 12, 23), n_neighbours=4)
    unit = W.double().numpy() / np.linalg.norm(W.double().numpy(), axis=1, keepdims=True)
    cosine = unit @ unit.T
    for prefix, end in zip(summary.prefixes, (5, 12, 23), strict=True):
        close = sum(abs(cosine[i, j]) > 0.9 for i in range(end) for j in range(i))
        pairs = end * (end - 1) // 2
        assert prefix.written() == pytest.approx(
            {"pairs": pairs, "close_pairs": close, "share": close / pairs}
        )
    assert summary.close_pairs > 0
    np.fill_diagonal(cosine, -2)
    order = np.argsort(-cosine, axis=1)[:, :4]
    assert np.array_equal(neighbours.latents.numpy(), order)
    assert neighbours.cosines.numpy() == pytest.approx(np.take_along_axis(cosine, order, 1), abs=1e-6)
    assert sum(summary.nearest_cosine_histogram) == 23


def test_opposite_rows_are_redundant_and_zero_rows_are_not() -> None:
    W = torch.tensor([[1.0, 0.0], [-2.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    summary, _ = decoder_similarity(W, (1, 5))
    assert summary.prefixes[0].written() == {"pairs": 0, "close_pairs": 0, "share": None}
    assert (summary.pairs, summary.close_pairs, summary.share) == (10, 1, 0.1)


def test_one_latent_has_no_neighbour() -> None:
    summary, neighbours = decoder_similarity(torch.ones(1, 3), (1,))
    assert summary.share is None
    assert neighbours.latents.shape == (1, 0)

import numpy as np
import pytest
import torch

from evaluate.metrics import coactivation
from evaluate.metrics.coactivation import Coactivation
from transcoder.entries import entries_above


def fire(seed: int, rows: int, latents: int) -> torch.Tensor:
    """[rows, latents] firings, rates from rare to always; 1 is a twin of 0, the last fires only with 2."""
    draw = torch.Generator().manual_seed(seed)
    active = torch.rand(rows, latents, generator=draw) < torch.linspace(0.05, 1.0, latents)
    active[:, 1] = active[:, 0]
    active[:, -1] = active[:, 2] & (torch.rand(rows, generator=draw) < 0.5)
    return active.float()


@pytest.mark.parametrize("cells", [1, 40, 1 << 22])
def test_twins_and_parents_equal_a_brute_force_count(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coactivation, "CELLS", cells)
    acts = fire(0, 300, 12)
    counter = Coactivation(12, 300)
    for block in acts.split(77):
        counter.add(entries_above(block, 0.0))
    twins, parents = counter.partners((4, 9, 12), n=3)
    a = acts.numpy().astype(int)
    firings, both = a.sum(0), a.T @ a
    enough = firings >= coactivation.MIN_FIRINGS
    for i in range(12):
        jaccard = {
            j: both[i, j] / (firings[i] + firings[j] - both[i, j])
            for j in range(12)
            if j != i and enough[i] and enough[j] and both[i, j]
        }
        expected = sorted(jaccard, key=lambda j: (-jaccard[j], j))[:3]
        assert [j for j in twins.latents[i] if j >= 0] == expected
        assert twins.scores[i, : len(expected)] == pytest.approx([jaccard[j] for j in expected])
        start = max(s for s in (0, 4, 9) if s <= i)
        lift = {j: both[i, j] / firings[i] - firings[j] / 300 for j in range(start) if j in jaccard}
        best = sorted((j for j in lift if lift[j] > 1e-12), key=lambda j: (-lift[j], j))[:3]
        assert [j for j in parents.latents[i] if j >= 0] == best
    assert twins.latents[0, 0] == 1
    assert twins.scores[0, 0] == 1.0
    assert parents.latents[11, 0] == 2


def test_rare_latents_have_no_partners() -> None:
    acts = torch.zeros(100, 3)
    acts[:15, 0] = acts[:15, 1] = 1.0
    counter = Coactivation(3, 100)
    counter.add(entries_above(acts, 0.0))
    twins, parents = counter.partners((1, 3))
    assert (twins.latents == -1).all()
    assert (parents.latents == -1).all()


def test_without_firings_all_scores_are_zero() -> None:
    counter = Coactivation(3, 10)
    counter.add(entries_above(torch.zeros(10, 3), 0.0))
    assert (counter.partners((1, 3))[0].scores == 0).all()


def test_the_sample_is_bounded_and_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coactivation, "SAMPLE_ROWS", 50)
    counter = Coactivation(2, 1000)
    kept = []
    for _ in range(10):
        before = counter.rows
        counter.add(entries_above(torch.ones(100, 2), 0.0))
        kept.append(counter.rows - before)
    assert counter.rows == 50
    assert kept == [5] * 10
    assert sum(map(len, counter._latents)) == 100


def test_partners_of_fewer_latents_than_asked_for() -> None:
    counter = Coactivation(2, 40)
    counter.add(entries_above(torch.ones(40, 2), 0.0))
    twins, _ = counter.partners((2,), n=4)
    assert twins.latents.tolist() == [[1, -1, -1, -1], [0, -1, -1, -1]]
    assert np.array_equal(twins.scores[:, 0], [1.0, 1.0])

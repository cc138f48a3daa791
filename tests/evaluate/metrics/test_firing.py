import pytest
import torch

from evaluate.metrics.firing import DENSITY_BINS, Firing
from transcoder.entries import entries_above

ACTS = torch.tensor(
    [
        [0.0, 1.0, 0.0, 0.5],
        [0.0, 3.0, 0.0, 0.0],
        [0.0, 2.0, 4.0, 0.0],
        [0.0, 0.0, 0.0, 0.0],
    ]
)


def test_firing_by_hand() -> None:
    firing = Firing(4)
    firing.add(entries_above(ACTS[:1], 0.0))
    firing.add(entries_above(ACTS[1:], 0.0))
    assert firing.firings.tolist() == [0, 3, 1, 1]
    assert firing.density.tolist() == [0.0, 0.75, 0.25, 0.25]
    assert firing.mean.tolist() == [0.0, 2.0, 4.0, 0.5]
    assert firing.largest.tolist() == [0.0, 3.0, 4.0, 0.5]
    assert firing.dead_fraction == 0.25
    result = firing.result()
    assert (result.rows, result.n, result.dead, result.alive) == (4, 4, 1, 3)
    assert (result.over_1_percent, result.over_10_percent) == (3, 3)
    assert result.median_density == 0.25
    assert result.largest_activation == 4.0
    assert result.mean_activation == pytest.approx(10.5 / 5)
    assert sum(result.log10_density_histogram) == 3


def test_limits_of_one_and_ten_percent_are_strict() -> None:
    acts = torch.zeros(1000, 3)
    acts[:10, 0], acts[:11, 1], acts[:101, 2] = 1.0, 1.0, 1.0
    firing = Firing(3)
    firing.add(entries_above(acts, 0.0))
    assert firing.result().over_1_percent == 2
    assert firing.result().over_10_percent == 1


def test_latents_that_never_fire_are_dead_and_have_no_means() -> None:
    firing = Firing(3)
    firing.add(entries_above(torch.zeros(5, 3), 0.0))
    result = firing.result()
    assert result.dead == 3
    assert firing.dead_fraction == 1.0
    assert result.median_density is None
    assert result.mean_activation is None
    assert sum(result.log10_density_histogram) == 0


def test_always_firing_and_very_rare_latents_stay_in_the_histogram() -> None:
    firing = Firing(2)
    firing.rows = 10**8
    firing.firings = torch.tensor([10**8, 1])
    histogram = firing.result().log10_density_histogram
    assert histogram[-1] == 1
    assert histogram[0] == 1
    assert len(histogram) == len(DENSITY_BINS) - 1

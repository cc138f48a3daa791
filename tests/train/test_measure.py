"""Thresholds and held-out numbers against closed forms and plain loops."""

import pytest
import torch

from tests.train.steps import problem
from train.measure import calibrate, measure, training_cut
from transcoder.frequent import frequent_level
from transcoder.heavy import Typical
from transcoder.transcoder import Transcoder

EVERY = Typical(torch.zeros(3), limit=torch.inf, variance=1.0)
"""No row is heavy."""


def tiny_transcoder(skip: bool = False) -> tuple[Transcoder, torch.Tensor, torch.Tensor]:
    p = problem(rows=400, skip=skip, dtype=torch.float32)
    return Transcoder(p.parameters, torch.zeros(3), (2, 5, 11)), p.x, p.y


@pytest.mark.parametrize("skip", [False, True])
def test_fvu_l0_and_dead_of_every_prefix(skip: bool) -> None:
    t, x, y = tiny_transcoder(skip)
    cuts = torch.tensor([0.5, 1.0, 6.0])
    measured = measure(t, zip(x.split(64), y.split(64), strict=True), lambda _: cuts, EVERY)
    variation = (y - y.mean(0)).square().sum()
    for g in range(3):
        narrow = t.prefix(g)
        narrow = Transcoder(narrow.parameters, cuts[g : g + 1], (narrow.d_sae,))
        acts = narrow.encode(x)
        assert measured.fvu[g] == pytest.approx(float((narrow(x) - y).square().sum() / variation), rel=1e-5)
        assert measured.l0[g] == pytest.approx(float((acts > 0).sum(1).float().mean()))
    densities = [
        (t.pre_activations(x)[:, :end] > cut).double().mean(0)
        for end, cut in zip(t.prefix_ends, cuts, strict=True)
    ]
    assert measured.dead_fraction == pytest.approx([float((each == 0).double().mean()) for each in densities])
    assert measured.over_10_percent_fraction == pytest.approx(
        [float((each > 0.1).double().mean()) for each in densities]
    )
    assert len({*measured.dead_fraction, *measured.over_10_percent_fraction}) > 2
    assert measured.dead == int(((t.pre_activations(x) > 6.0).sum(0) == 0).sum())
    assert 0 < measured.dead < 11
    assert measured.rows == 400


def test_fvu_without_heavy_rows_is_that_of_the_others() -> None:
    t, x, y = tiny_transcoder()
    y[7] *= 1000
    cuts = torch.tensor([0.5, 1.0, 6.0])
    typical = Typical(torch.zeros(3), limit=1000.0, variance=1.0)
    measured = measure(t, zip(x.split(64), y.split(64), strict=True), lambda _: cuts, typical)
    others = torch.arange(400) != 7
    assert measured.heavy_rows == 1
    assert measured.fvu_typical == pytest.approx(
        measure(t, [(x[others], y[others])], lambda _: cuts, EVERY).fvu
    )
    assert measured.fvu != pytest.approx(measured.fvu_typical, rel=0.1)


def test_fvu_of_perfect_mean_and_constant_outputs() -> None:
    t, x, _ = tiny_transcoder()
    y = t(x)
    cuts = torch.tensor([0.0, 0.0, 0.0])
    assert measure(t, [(x, y)], lambda _: cuts, EVERY).fvu[2] == pytest.approx(0.0, abs=1e-10)
    never = torch.full((3,), 1e9)
    constant = Transcoder(t.parameters, never, t.prefix_ends)
    constant.b_dec.copy_(y.mean(0))
    assert measure(constant, [(x, y)], lambda _: never, EVERY).fvu == pytest.approx([1.0, 1.0, 1.0], rel=1e-5)
    assert measure(constant, [(x, torch.ones_like(y))], lambda _: never, EVERY).fvu == [None, None, None]
    for value in (0.1, 0.7, 1 / 3, 123.456):  # whose sum of squares less n mean^2 is not zero but noise
        pairs = [*zip(x.split(100), torch.full_like(y, value).split(100), strict=True)]
        assert measure(constant, pairs, lambda _: never, EVERY).fvu == [None, None, None]


@pytest.mark.parametrize(
    ("share", "level"),
    [(0.0, "good"), (0.01, "good"), (0.011, "moderate"), (0.05, "moderate"), (0.051, "poor")],
)
def test_the_verdict_on_frequent_latents(share: float, level: str) -> None:
    assert frequent_level(share) == level


@pytest.mark.parametrize("kept", [[0.3, 1.0, 2.0], [0.0, 0.01, 0.5], [1.0, 3.0, 11.0]])
def test_thresholds_are_midpoints(kept: list[float]) -> None:
    t, x, _ = tiny_transcoder()
    thresholds = calibrate(t, lambda: iter(x.split(50)), kept)
    pre = t.pre_activations(x)
    for g, end in enumerate(t.prefix_ends):
        values = pre[:, :end][pre[:, :end] > 0].sort(descending=True).values
        n = round(400 * kept[g])
        expected = 0.0 if n + 1 > len(values) else float((values[max(n - 1, 0)] + values[n]) / 2)
        assert float(thresholds[g]) == pytest.approx(expected, rel=1e-6)
        if expected and n:
            assert int((pre[:, :end] > thresholds[g]).sum()) == n


def test_a_guess_from_an_untypical_first_batch_does_no_harm() -> None:
    t, x, _ = tiny_transcoder()
    x = torch.cat([x[:50] * 100, x[50:]])
    thresholds = calibrate(t, lambda: iter(x.split(50)), [0.3, 1.0, 2.0])
    pre = t.pre_activations(x)
    assert int((pre > thresholds[2]).sum()) == 800


def test_training_cut_keeps_what_training_keeps() -> None:
    t, x, _ = tiny_transcoder()
    pre = t.pre_activations(x)
    assert [int((pre > cut).sum()) for cut in training_cut(2, 3)(pre)] == [800, 800, 800]

"""Differences between transcoders in closed form: at equal L0, at equally many latents."""

from math import log, sqrt

import pytest

from evaluate.metrics.side_by_side import Measured, equal_l0, fvu_at, line_of
from evaluate.records import AblationLosses, LanguageMetrics, PrefixMetrics

CURVE = [(4.0, 0.5), (16.0, 0.3), (64.0, 0.2)]


@pytest.mark.parametrize(
    ("l0", "expected"),
    [
        (4.0, 0.5),
        (8.0, 0.4),  # half way from 4 to 16 in log L0
        (16.0, 0.3),
        (16 * sqrt(2), 0.275),  # a quarter of the way to 64
        (64.0, 0.2),
        (66.0, 0.2 - 0.1 * log(66 / 64) / log(4)),  # on the last line, less than 5 % beyond
        (3.9, 0.5 + 0.2 * log(4 / 3.9) / log(4)),
        (67.3, None),
        (3.8, None),
    ],
)
@pytest.mark.parametrize("points", [CURVE, CURVE[::-1], [(0.0, 0.9), *CURVE, (32.0, None)]])
def test_between_prefixes_the_error_is_straight_in_the_logarithm_of_l0(
    points: list[tuple[float, float | None]], l0: float, expected: float | None
) -> None:
    found = fvu_at(points, l0)
    assert found == (expected if expected is None else pytest.approx(expected, abs=1e-12))


def test_one_prefix_has_no_line_and_of_equal_l0_the_widest_counts() -> None:
    assert fvu_at([(8.0, 0.4)], 8.0) == 0.4
    assert fvu_at([(8.0, 0.4)], 8.001) is None
    assert fvu_at([(8.0, 0.4), (8.0, 0.3), (16.0, 0.2)], 8.0) == 0.3
    assert fvu_at([], 8.0) is None
    assert fvu_at([(8.0, None)], 8.0) is None


def measured(
    name: str, g: int, end: int, l0: float, fvu: float, recovered: float | None = None, positions: int = 100
) -> Measured:
    language = None
    if recovered is not None:
        language = LanguageMetrics(cross_entropy=3, kl=0.5, recovered_zero=recovered, recovered_mean=0)
    losses = AblationLosses(skipped=None, contexts=1, positions=positions, clean=2, zero=4, mean=4)
    metrics = PrefixMetrics(
        fvu=fvu,
        mse=1,
        mae=1,
        cosine=0,
        relative_bias=None,
        l0=l0,
        l0_median=1,
        l0_std=0,
        l0_histogram=[],
        l1=0,
        end=end,
        threshold=0,
        dead_fraction=0.25,
        over_1_percent=0,
        over_10_percent=0,
        over_10_percent_fraction=0,
        over_10_percent_verdict="good",
        training_selection=None,
        cross_entropy=language,
    )
    return Measured(name, g, metrics, 0.0, losses if recovered else None)


RUN = [measured("run", 0, 8, 4, 0.5, 0.5), measured("run", 1, 32, 16, 0.3, 0.75)]


def test_two_runs_meet_at_the_l0_of_each_others_prefixes() -> None:
    other = [measured("other", 0, 8, 8, 0.3), measured("other", 1, 20, 32, 0.1)]
    found = [*equal_l0(RUN, other)]
    assert [(each.other, each.transcoder, each.prefix, each.l0) for each in found] == [
        ("other", "other", 0, 8.0),
        ("other", "run", 1, 16.0),
    ]
    values = [(each.run_fvu, each.fvu, each.difference) for each in found]
    assert values == [pytest.approx((0.4, 0.3, -0.1)), pytest.approx((0.3, 0.2, -0.1))]
    alone = [*equal_l0([measured("run", 0, 8, 16, 0.4)], other)]  # of one prefix: the other has the line
    assert [(each.transcoder, each.fvu) for each in alone] == [("run", pytest.approx(0.2))]
    assert [*equal_l0(RUN, [measured("other", 0, 8, 40, 0.1)])] == []


def test_the_same_l0_is_told_once() -> None:
    assert [(each.l0, each.difference) for each in equal_l0(RUN, RUN)] == [(4, 0), (16, 0)]


def test_differences_are_to_as_many_latents_and_to_the_full_dictionary() -> None:
    line = line_of(measured("other", 0, 8, 5, 0.25, 0.25), RUN)
    assert line.equal_latents is not None
    assert (line.equal_latents.fvu, line.equal_latents.l0, line.equal_latents.recovered_zero) == (
        -0.25,
        1,
        -0.25,
    )
    assert (line.difference.fvu, line.difference.recovered_zero) == (pytest.approx(-0.05), -0.5)
    assert line.difference.relative_bias is None
    assert line_of(measured("other", 0, 9, 5, 0.25), RUN).equal_latents is None
    assert line_of(RUN[0], RUN).equal_latents is None


def test_cross_entropies_of_other_tokens_have_no_difference() -> None:
    line = line_of(measured("other", 0, 8, 5, 0.25, 0.25, positions=99), RUN)
    assert line.equal_latents is not None
    assert (line.equal_latents.fvu, line.equal_latents.recovered_zero, line.equal_latents.kl) == (
        -0.25,
        None,
        None,
    )

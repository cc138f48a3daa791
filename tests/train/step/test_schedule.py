import pytest

from train.step.schedule import LR, learning_rate, peak_rate


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.25), (1, 0.5), (2, 0.75), (3, 1.0), (5, 0.55), (7, 0.1)],
)
def test_warm_up_then_cosine_to_the_final_rate(step: int, expected: float) -> None:
    assert learning_rate(step, 8, peak=1.0, final=0.1, warmup=3) == pytest.approx(expected)


def test_without_warm_up_it_starts_at_the_peak() -> None:
    assert learning_rate(0, 5, peak=2.0, final=0.0, warmup=0) == 2.0


def test_steps_beyond_the_plan_stay_at_the_final_rate() -> None:
    assert learning_rate(99, 5, peak=2.0, final=0.5, warmup=0) == 0.5


def test_one_step_is_enough() -> None:
    assert learning_rate(0, 1, peak=2.0, final=0.5, warmup=0) == 2.0


def test_the_rate_falls_with_the_root_of_width_and_latents_and_with_the_steps() -> None:
    demo = peak_rate(576, 4608, 1600)
    assert demo == LR
    assert peak_rate(576, 4 * 4608, 1600) == pytest.approx(demo / 2)
    assert peak_rate(4 * 576, 4 * 4608, 1600) == pytest.approx(demo / 4)
    assert peak_rate(576, 4608, 4 * 1600) == pytest.approx(demo / 2)
    assert peak_rate(576, 4608, 1) == peak_rate(576, 4608, 300) < 2.5 * demo

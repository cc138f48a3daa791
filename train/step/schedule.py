"""Step -> learning rate, and number of active latents: pure functions."""

import math

LR = 3e-3
"""Best peak rate at d_in 576, d_sae 4,608 and 1,600 steps (docs/log.md)."""
DENSER = 2.0
"""Active latents per row at the start, over k. See `active_latents`."""
DENSER_UNTIL = 0.3
"""Share of the run after which there are k."""
SHORT = 300
"""Runs of fewer steps have the rate of this many."""


def peak_rate(d_in: int, d_sae: int, steps: int) -> float:
    """The learning rate of train.lr = "auto": LR * sqrt(576 / d_in * 4608 / d_sae * 1600 / steps).

    LR was tuned on the demo: d_in 576, d_sae 4,608, 1,600 steps. With more latents each explains a smaller part, and
    equal steps of all of them move the reconstruction more: 1 / sqrt(d_sae). A unit decoder row of a wider layer has
    smaller entries, in proportion to 1 / sqrt(d_in), but Adam's step on each entry has the same size. A longer run
    gains from smaller steps: the best rates of 320, 600 and 1,600 steps were about 7e-3, 5.5e-3 and 3.7e-3 with one
    rate for all groups; now coarse groups have more (`optimizer.group_rates`), and this is the last group's.
    docs/log.md says where the rule was checked.

    >>> f"{peak_rate(576, 4608, 1600):.2g}, {peak_rate(2304, 18432, 14_648):.2g}"
    '0.003, 0.00025'
    """
    return LR * (576 / d_in * 4608 / d_sae) ** 0.5 * (1600 / max(steps, SHORT)) ** 0.5


def learning_rate(step: int, steps: int, *, peak: float, final: float, warmup: int) -> float:
    """Learning rate of `step` (0-based) of `steps`: linear warm-up to `peak`, then a cosine down to `final`.

    Step w of the warm-up has peak * (w + 1) / (warmup + 1); the last step has `final`.

    >>> [round(learning_rate(step, 7, peak=4.0, final=0.0, warmup=3), 6) for step in range(7)]
    [1.0, 2.0, 3.0, 4.0, 3.0, 1.0, 0.0]
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def active_latents(step: int, steps: int, k: int, d_sae: int) -> int:
    """Active latents per row at `step` (0-based) of `steps`: from DENSER * k geometrically down to k at DENSER_UNTIL.

    More active latents at the start let each latent find its direction before it competes for few places.

    >>> [active_latents(step, 20, k=32, d_sae=4608) for step in range(8)]
    [64, 57, 51, 45, 40, 36, 32, 32]
    """
    if steps < 2:  # the thresholds are calibrated for the last steps' k
        return min(d_sae, k)
    remaining = max(0.0, 1 - step / (DENSER_UNTIL * steps))
    return min(d_sae, round(k * DENSER**remaining))

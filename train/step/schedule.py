"""Step -> learning rate. Pure."""

import math

LR = 3e-3
"""Peak rate at d_in 576, d_sae 4,608 and 1,600 steps: the best of those in docs/log.md."""
SHORT = 300
"""Steps below which the rate rises no more."""


def peak_rate(d_in: int, d_sae: int, steps: int) -> float:
    """The learning rate that train.lr = "auto" stands for: LR * sqrt(576 / d_in * 4608 / d_sae) * sqrt(1600 / steps).

    LR was tuned at d_in 576, d_sae 4,608 and 1,600 steps (the demo). With more latents each explains a smaller part,
    and the same steps of all of them move the reconstruction more: 1 / sqrt(d_sae). A unit decoder row of a wider layer
    has smaller entries, in proportion to 1 / sqrt(d_in), and Adam's step has the same size for each. A longer run has
    time for smaller steps, and gains by them: the best rates of 320, 600 and 1,600 steps were about 7e-3, 5.5e-3 and
    3.7e-3 with one rate for all groups. Now the coarse groups have more (`optimizer.group_rates`), and this is the last
    group's. How far the rule was checked: docs/log.md.
    """
    return LR * (576 / d_in * 4608 / d_sae) ** 0.5 * (1600 / max(steps, SHORT)) ** 0.5


def learning_rate(step: int, steps: int, *, peak: float, final: float, warmup: int) -> float:
    """Learning rate of `step` (0-based) of `steps`: linear warm-up to `peak`, cosine to `final`.

    Step w of the warm-up has peak * (w + 1) / (warmup + 1); the last step has `final`.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

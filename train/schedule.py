"""Step -> learning rate. Pure."""

import math


def learning_rate(step: int, steps: int, *, peak: float, final: float, warmup: int) -> float:
    """Learning rate of `step` (0-based) of `steps`: linear warm-up to `peak`, cosine to `final`.

    Step w of the warm-up has peak * (w + 1) / (warmup + 1); the last step has `final`.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

"""The space that training works in, made of the moments that every store's manifest holds.

Shapes: B rows, D_in, D_out. Folding it into the weights, and out of them: `Parameters` in transcoder/transcoder.py.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from shards.manifest import Moments

POWER = 0.5
"""Of an input dimension's standard deviation, by which it is divided: between one scale for all (0) and a variance of
1 in each (1). Measured on a list of stores, see docs/log.md."""
LEAST_VARIANCE = 1e-4
"""Of a dimension, relative to the mean one: less is not made larger still, as it may be storing's noise."""
NORMALISATION = (
    f"inputs centred, each dimension divided by its std to the power {POWER}; outputs by the std of all"
)


@dataclass(frozen=True, eq=False)
class Scaling:
    """Normalised space: x = (input - mean_in) / scale_in, y = output / scale_out."""

    mean_in: Float[Tensor, " D_in"]
    """Mean raw input. Most of the inputs' energy can lie in it (52 % in SmolLM2's layer 12, 97 % in Gemma-3-270M's
    layer 9); where it was left in, Adam's first steps moved whole latents along it, to where they are negative on
    every row."""
    scale_in: Float[Tensor, " D_in"]
    """Of each dimension: `input_scale` of its variance."""
    scale_out: float
    """Root mean square of the centred outputs."""

    @classmethod
    def of(cls, inputs: Moments, outputs: Moments, device: torch.device | str = "cpu") -> "Scaling":
        """From the moments of a store's train rows. Neither mean has a say in the scales."""
        mean = torch.tensor(inputs.mean, dtype=torch.float32, device=device)
        scale_in = torch.from_numpy(input_scale(inputs.variance)).to(mean)
        return cls(mean, scale_in, float(np.sqrt(outputs.variance.mean())) or 1.0)

    def inputs(self, raw: Float[Tensor, "B D_in"]) -> Float[Tensor, "B D_in"]:
        """x of raw inputs."""
        return (raw - self.mean_in).div_(self.scale_in)

    def outputs(self, raw: Float[Tensor, "B D_out"]) -> Float[Tensor, "B D_out"]:
        """y of raw outputs."""
        return raw / self.scale_out


def input_scale(variance: np.ndarray) -> np.ndarray:
    """[D] float64 by which the centred input dimensions of these variances are divided: std^POWER, in such units that
    the rows have a mean square of 1. All 1 where nothing varies.
    """
    typical = variance.mean()
    if not typical:
        return np.ones_like(variance)
    relative = variance / typical
    scale = np.maximum(relative, LEAST_VARIANCE) ** (POWER / 2)
    return scale * np.sqrt(typical * np.mean(relative / scale**2))

"""Normalised space, in which training works. It follows from the moments in a store's manifest.

Shapes: B rows, D_in, D_out. `fold` puts the normalisation into the weights, `unfold` takes it out.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from shards.manifest import Moments
from transcoder.transcoder import Parameters

POWER = 0.5
"""An input dimension is divided by its standard deviation to this power. 0 is one scale for all dimensions, 1 gives
each a variance of 1. Measured on several stores, see docs/log.md."""
LEAST_VARIANCE = 1e-4
"""Variances below this share of the mean variance count as this share: they may be quantisation noise."""
NORMALISATION = (
    f"inputs centred, each dimension divided by its std to the power {POWER}; outputs by the std of all"
)


@dataclass(frozen=True, eq=False)
class Scaling:
    """Normalised space: x = (input - mean_in) / scale_in, y = output / scale_out."""

    mean_in: Float[Tensor, " D_in"]
    """Mean raw input. It can hold most of the inputs' energy (52 % in SmolLM2's layer 12, 97 % in Gemma-3-270M's
    layer 9). With it in the inputs, Adam's first steps move many latents along it until they never fire."""
    scale_in: Float[Tensor, " D_in"]
    """Divisor of each dimension: `input_scale` of its variance."""
    scale_out: float
    """Root mean square of the centred outputs; a heavy row counts like one at the limit (`transcoder.heavy`)."""

    @classmethod
    def of(
        cls, inputs: Moments, output_variance: float, d_out: int, device: torch.device | str = "cpu"
    ) -> "Scaling":
        """The scaling of a store: moments of its train inputs, variance of its outputs, summed over `d_out` dimensions.

        The scales do not depend on the means.
        """
        mean = torch.tensor(inputs.mean, dtype=torch.float32, device=device)
        scale_in = torch.from_numpy(input_scale(inputs.variance)).to(mean)
        return cls(mean, scale_in, (output_variance / d_out) ** 0.5 or 1.0)

    def inputs(self, raw: Float[Tensor, "B D_in"]) -> Float[Tensor, "B D_in"]:
        """Raw inputs -> x."""
        return (raw - self.mean_in).div_(self.scale_in)

    def outputs(self, raw: Float[Tensor, "B D_out"]) -> Float[Tensor, "B D_out"]:
        """Raw outputs -> y."""
        return raw / self.scale_out


def input_scale(variance: np.ndarray) -> np.ndarray:
    """[D] float64 divisors of centred input dimensions with these variances: std^POWER, times one factor that gives
    the rows a mean square of 1. All are 1 if nothing varies.

    >>> scale = input_scale(np.array([16.0, 1.0]))  # std 4 and 1: divisors in the ratio 4^0.5 = 2
    >>> bool(np.isclose(scale[0] / scale[1], 2.0)), bool(np.isclose(np.mean([16, 1] / scale**2), 1.0))
    (True, True)
    """
    typical = variance.mean()
    if not typical:
        return np.ones_like(variance)
    relative = variance / typical
    scale = np.maximum(relative, LEAST_VARIANCE) ** (POWER / 2)
    return scale * np.sqrt(typical * np.mean(relative / scale**2))


def fold(trained: Parameters, by: Scaling) -> Parameters:
    """Parameters on normalised activations -> the same transcoder on raw ones.

    With a = relu(x W_enc^T + b_enc) the raw activation is scale_out * a, so that decoder rows
    keep unit norm: output = scale_out * y = (scale_out * a) W_dec + scale_out * b_dec. The mean
    input goes into the biases. W_dec is shared, not copied.
    """
    ratio, mean = by.scale_out / by.scale_in, by.mean_in.double()
    W_enc = trained.W_enc * ratio
    W_skip = None if trained.W_skip is None else trained.W_skip * ratio
    b_enc, b_dec = trained.b_enc * by.scale_out, trained.b_dec * by.scale_out
    return Parameters(
        W_enc=W_enc,
        b_enc=b_enc - _product(W_enc, mean),
        W_dec=trained.W_dec,
        b_dec=b_dec if W_skip is None else b_dec - _product(W_skip, mean),
        W_skip=W_skip,
    )


def unfold(raw: Parameters, by: Scaling) -> Parameters:
    """The inverse of `fold`."""
    ratio, mean = by.scale_in / by.scale_out, by.mean_in.double()
    b_enc = raw.b_enc + _product(raw.W_enc, mean)
    b_dec = raw.b_dec if raw.W_skip is None else raw.b_dec + _product(raw.W_skip, mean)
    return Parameters(
        W_enc=raw.W_enc * ratio,
        b_enc=b_enc / by.scale_out,
        W_dec=raw.W_dec,
        b_dec=b_dec / by.scale_out,
        W_skip=None if raw.W_skip is None else raw.W_skip * ratio,
    )


def _product(matrix: Tensor, vector: Tensor, block: int = 1024) -> Tensor:
    """matrix @ vector in float64, without a float64 copy of the whole matrix."""
    return torch.cat([rows.double() @ vector for rows in matrix.split(block)]).to(matrix.dtype)

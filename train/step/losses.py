"""The losses that training minimises. Pure: nothing here changes state.

The L2 loss is nested as in Matryoshka SAEs (Bussmann et al. 2025, arXiv:2503.17547); the auxiliary loss on dead latents
is that of Gao et al. 2024 (arXiv:2406.04093), with another scale.

Shapes: B rows, D_in, D_out, F latents, G prefixes, N dead latents.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from common.device import constant
from common.processes import ALONE, Processes
from transcoder.entries import Entries

DENSE_SHARE = 1 / 8
"""Share of active latents above which a step is `dense`."""


@dataclass(frozen=True)
class Objective:
    """All that a training step needs besides parameters and rows."""

    prefix_ends: tuple[int, ...]
    prefix_weights: tuple[float, ...]
    """Weight of each prefix's mean squared error; they sum to 1."""
    k: int
    selection: str
    """batch_topk or topk."""
    aux_k: int
    aux_coefficient: float
    precision: str = "float32"
    """Precision of the products: float32, tfloat32 or bfloat16. Sums and weights are float32 always."""

    @property
    def d_sae(self) -> int:
        """F, the last prefix end."""
        return self.prefix_ends[-1]

    def of(self, latents: slice) -> "Objective":
        """The same of these latents alone, numbered from 0. A group may be empty there."""
        return replace(self, prefix_ends=ends_within(self.prefix_ends, latents))

    @property
    def dense(self) -> bool:
        """Whether so many latents are active that a step on all of them is the faster one."""
        return self.k > DENSE_SHARE * self.d_sae


def ends_within(prefix_ends: Sequence[int], latents: slice) -> tuple[int, ...]:
    """The prefix ends as the latents [start, stop) see them, which are numbered from 0.

    >>> ends_within((4, 10, 20), slice(6, 12))  # none of the first group, 6 to 9 of the second, 10 and 11 of the third
    (0, 4, 6)
    """
    return tuple(min(max(end, latents.start), latents.stop) - latents.start for end in prefix_ends)


def prefix_weights(n: int) -> tuple[float, ...]:
    """Weights of the losses of n prefixes, coarsest first; they sum to 1.

    In proportion 1.1, 1, ..., 1, 1.3. The whole dictionary counts more: equal weights cost it more by being nested
    (docs/log.md). The first prefix has the fewest latents and is read first.
    """
    shares = [1.1, *[1.0] * (n - 2), 1.3][-n:]
    return tuple(share / sum(shares) for share in shares)


class StepValues(NamedTuple):
    """The measurements of a training step; the gradients are apart."""

    squared_errors: Float[Tensor, " G"]
    """Sum over rows and dimensions of (y_g - y)^2 times the row's weight, float64."""
    l2_loss: Tensor
    aux_loss: Tensor
    """With its coefficient."""
    fired: Tensor
    """[F] int: number of this process's rows on which each of its latents is active."""
    active: Callable[[], Entries]
    """Gives the active latents of this process's rows, those that it holds. The host waits for them."""
    cut: Tensor
    """Smallest activation that the selection kept (tau)."""
    n_dead: int
    """Latents that were dead, of the whole transcoder."""

    @property
    def entries(self) -> Entries:
        """The active latents of this process's rows."""
        return self.active()

    @property
    def loss(self) -> Tensor:
        """The loss that the gradients belong to."""
        return self.l2_loss + self.aux_loss


REVIVAL = 2e-3
"""Pull on the bias of a dead latent, over D_out. 1.2e-3 keeps all but 0.1 % alive at lr 7e-3 (docs/log.md), 6e-5 all
but 4 %, 6e-3 as many as 1.2e-3 at the same FVU."""


def revival(dead: Tensor, d_sae: int, d_out: int) -> Float[Tensor, " F"]:
    """Gradient by b_enc of -REVIVAL / D_out * sum over dead latents of their bias.

    A latent whose pre-activation is negative on every row gets no gradient from the reconstruction, and none from the
    auxiliary loss, which sees relu(pre-activation). This gradient raises its bias until it gets one. It follows the
    pre-activation loss of Anthropic's Circuits Updates (January 2025), which is a hinge below the threshold; this one
    ends when the latent fires.
    """
    return torch.zeros(d_sae, device=dead.device).index_fill_(0, dead, -REVIVAL / d_out)


def nested_loss(
    squared_errors: Float[Tensor, " G"], prefix_weights: tuple[float, ...], n_values: int
) -> Float[Tensor, ""]:
    """sum over g of w_g * mean over batch and dimensions of (y_g - y)^2; n_values = B * D_out.

    >>> float(nested_loss(torch.tensor([49.0, 9.0]), prefix_weights=(0.25, 0.75), n_values=1))
    19.0
    """
    weights = constant(prefix_weights, squared_errors.dtype, squared_errors.device)
    return squared_errors @ weights / n_values


def weighted(values: Float[Tensor, "B D"], weights: Float[Tensor, " B"] | None) -> Float[Tensor, "B D"]:
    """Each row times its weight, or as it is."""
    return values if weights is None else values * weights[:, None]


def aux_loss(
    x: Float[Tensor, "B D_in"],
    residual: Float[Tensor, "B D_out"],
    W_enc: Float[Tensor, "N D_in"],
    b_enc: Float[Tensor, " N"],
    W_dec: Float[Tensor, "N D_out"],
    *,
    aux_k: int,
    coefficient: float,
    weights: Tensor | None = None,
    peers: Processes = ALONE,
) -> Float[Tensor, ""]:
    """How badly the dead latents reconstruct the error of the living ones (Gao et al. 2024, section A.2).

    coefficient * min(1, N / aux_k) * sum ||e_hat - e||^2 / sum ||e||^2 with e = `residual` = y - y_G
    (detached by the caller), e_hat = z W_dec, z the top min(aux_k, N) per row of the dead latents'
    relu(pre-activation). Both sums run over all rows and dimensions, so the coefficient does not
    depend on the scale of the residual. Each row counts by its weight. No b_dec, no skip. Zero when the residual
    is zero.
    The denominator sums the rows of all `peers`, the numerator those of this process.
    """
    n_dead = len(W_enc)
    z = torch.relu(torch.addmm(b_enc, x, W_enc.T))
    if aux_k < n_dead:
        top = z.topk(aux_k, dim=1)
        z = torch.zeros_like(z).scatter(1, top.indices, top.values)
    size = peers.total(weighted(residual.square(), weights).sum())
    error = weighted((z @ W_dec - residual).square(), weights).sum()
    scale = coefficient * min(1.0, n_dead / aux_k)
    return scale * torch.where(size > 0, error / torch.where(size > 0, size, 1.0), 0.0 * error)

"""Adam with a unit-norm decoder, on blocks of latents while their gradients are in the cache."""

from collections.abc import Sequence

import torch
from torch import Tensor

from common.processes import ALONE, Processes
from train.step.gradients import Gradients
from train.step.losses import ends_within
from transcoder.transcoder import Parameters

BETAS = (0.9, 0.99)
"""Held-out FVU of the demo after 800 steps: 0.369 with 0.99, 0.378 with 0.999. With 0.95 latents die."""
EPSILON = 1e-8
DECODER_RATE = 2.0
"""Factor of the learning rate of W_dec, see `rates`."""
GROUP_POWER = 0.25
"""Of d_sae / prefix end, see `group_rates`."""
DECAY = 0.4
"""Decoupled weight decay of W_enc (AdamW, Loshchilov and Hutter 2019): each step takes lr * DECAY of it. On the demo it
is worth 0.5 % of the FVU, and the coarse groups fire less often; at 1 latents of a short run die (docs/log.md)."""


def rates(parameters: Parameters) -> dict[str, float]:
    """Factor of the learning rate by parameter: sqrt(D_in) / 2 for b_enc, DECODER_RATE for W_dec, 1 otherwise.

    W_dec: its rows keep unit norm, so it bears a rate that is too high for the encoder. Held-out FVU of the demo after
    600 steps at lr 5e-3: 0.386 with factor 0.5, 0.369 with 1, 0.362 with 2, 0.363 with 3, 0.365 with 4.

    b_enc: Adam moves every number by about the learning rate. D_in numbers of a row of W_enc move a pre-activation
    together, b_enc only one, so biases lag behind at the same rate. Held-out FVU of the demo (D_in 576) after 800
    steps: 0.413 with factor 1, 0.403 with 5, 0.397 with 20; 0.402 with 60, and 19 % of the latents dead.
    """
    bias = parameters.W_enc.shape[1] ** 0.5 / 2
    return dict.fromkeys(parameters.named(), 1.0) | {"b_enc": bias, "W_dec": DECODER_RATE}


def group_rates(prefix_ends: Sequence[int]) -> list[float]:
    """Factor of the learning rate of each group's latents: (d_sae / prefix end)^GROUP_POWER, 1 for the last group.

    A coarse prefix is a small dictionary, and a smaller dictionary learns faster (`schedule.peak_rate`): measured, the
    coarse prefixes want a higher rate than the whole dictionary does (docs/log.md).
    """
    return [(prefix_ends[-1] / end) ** GROUP_POWER for end in prefix_ends]


class Adam:
    """Adam's state for `parameters`, and its update of any rows of one of them.

    The fused kernel reads and writes each number once. PyTorch's optimizer class calls the same kernel, but only
    for whole parameters, so it needs whole gradients. tests/test_private_torch.py says what to do when PyTorch
    changes the kernel's private function.
    """

    def __init__(
        self,
        parameters: Parameters,
        prefix_ends: Sequence[int] | None = None,
        latents: slice | None = None,
    ) -> None:
        """`prefix_ends`: of the groups of latents; None: one group. `latents`: which of them these are; None: all."""
        self.parameters, self.rates = parameters, rates(parameters)
        whole = prefix_ends or (len(parameters.b_enc),)
        ends = ends_within(whole, latents or slice(0, whole[-1]))
        self.groups = list(zip((0, *ends[:-1]), ends, group_rates(whole), strict=True))
        """(first latent, end, factor of the learning rate) of each group."""
        named = parameters.named()
        self.mean = {name: torch.zeros_like(tensor) for name, tensor in named.items()}
        self.square = {name: torch.zeros_like(tensor) for name, tensor in named.items()}
        self.steps = torch.zeros((), device=parameters.W_enc.device)

        self.skip = torch.zeros(1, device=parameters.W_enc.device)
        """1 makes the kernel change nothing, without a wait of the host."""
        self.divisor: Tensor | None = None
        """[1] float32 by which the kernel divides every gradient; None: 1."""

    def update(self, name: str, gradient: Tensor, lr: float) -> None:
        """Adam's step for the whole of parameter `name`, whose gradient this is; `lr` before `rates`."""
        self._step(name, slice(None), gradient, lr * self.rates[name])

    def update_latents(self, name: str, gradient: Tensor, lr: float, rows: slice) -> None:
        """Adam's step for latents `rows` of parameter `name`, at the rate of the group that each is in.

        For example rows 4 to 12 of groups [0, 6) and [6, 16): one call for 4 to 6, one for 6 to 12.
        """
        for first, end, factor in self.groups:
            start, stop = max(rows.start, first), min(rows.stop, end)
            if start < stop:
                part = gradient[start - rows.start : stop - rows.start]
                decay = DECAY / factor if name == "W_enc" else 0.0  # lr * DECAY in every group
                self._step(name, slice(start, stop), part, lr * self.rates[name] * factor, decay)

    def _step(self, name: str, rows: slice, gradient: Tensor, lr: float, decay: float = 0.0) -> None:
        torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
            [self.parameters.named()[name][rows]],
            [gradient],
            [self.mean[name][rows]],
            [self.square[name][rows]],
            [],
            [self.steps],
            lr=lr,
            beta1=BETAS[0],
            beta2=BETAS[1],
            weight_decay=decay,
            eps=EPSILON,
            amsgrad=False,
            maximize=False,
            grad_scale=self.divisor,
            found_inf=self.skip,
        )


def apply(
    adam: Adam,
    gradients: Gradients,
    lr: float,
    clip_norm: float | None = None,
    holders: Processes = ALONE,
) -> None:
    """One optimizer step: clip, project the decoder's gradient, Adam, renormalise the decoder.

    The gradients' norm is that of all latents, which the `holders` have.
    """
    adam.divisor = None if clip_norm is None else clip_divisor(gradients, clip_norm, holders)
    adam.steps += 1
    W_dec = adam.parameters.W_dec
    for block in gradients.blocks():
        rows = W_dec[block.rows]
        project(block.W_dec, block.along, rows)
        for name in ("W_enc", "b_enc", "W_dec"):
            adam.update_latents(name, getattr(block, name), lr, block.rows)
        renormalise(rows)
        del block  # the next one takes its memory
    for name, gradient in gradients.shared.items():
        adam.update(name, gradient, lr)


def project(gradient: Tensor, along: Tensor, rows: Tensor) -> None:
    """Remove in place the component of each row of `gradient` along the unit row of `rows`; `along` is its length."""
    gradient.addcmul_(rows, along[:, None], value=-1)


def renormalise(rows: Tensor) -> None:
    """Give each row unit norm, in place."""
    rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True))


def clip_divisor(gradients: Gradients, clip_norm: float, holders: Processes = ALONE) -> Tensor:
    """[1] max(1, norm of all gradients / clip_norm), the decoder's after projection.

    Computes every block twice instead of keeping all: few runs clip, and all blocks need much memory. The projection
    takes `along` of a row's gradient, whose square is what is left out here: the decoder's rows have unit norm.
    """
    shared = gradients.shared.values() if holders.leads else ()
    squares = [gradient.double().square().sum() for gradient in shared]
    for block in gradients.blocks():
        squares += [gradient.double().square().sum() for gradient in block[1:4]]
        squares.append(-block.along.double().square().sum())
    norm = holders.total(torch.stack(squares).sum()).clamp_min(0).sqrt()
    return (norm / clip_norm).clamp_min(1).float().view(1)

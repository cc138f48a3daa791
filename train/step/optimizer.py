"""Adam with a unit-norm decoder, on blocks of latents while their gradients are in the cache."""

import torch
from torch import Tensor

from train.step.gradients import Gradients
from transcoder.transcoder import Parameters

BETAS = (0.9, 0.99)
"""Held-out FVU of the demo after 800 steps: 0.369 with 0.99, 0.378 with 0.999. With 0.95 latents die."""
EPSILON = 1e-8
DECODER_RATE = 2.0
"""Factor of W_dec's learning rate, see `rates`."""


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


class Adam:
    """Adam's state for `parameters`, and its update of any rows of one of them.

    The fused kernel reads and writes each number once. PyTorch's optimizer class calls the same kernel, but only
    for whole parameters, so it needs whole gradients. tests/test_private_torch.py says what to do when PyTorch
    changes the kernel's private function.
    """

    def __init__(self, parameters: Parameters) -> None:
        self.parameters, self.rates = parameters, rates(parameters)
        named = parameters.named()
        self.mean = {name: torch.zeros_like(tensor) for name, tensor in named.items()}
        self.square = {name: torch.zeros_like(tensor) for name, tensor in named.items()}
        self.steps = torch.zeros((), device=parameters.W_enc.device)

    def update(self, name: str, gradient: Tensor, lr: float, rows: slice = slice(None)) -> None:
        """Adam's step on `rows` of parameter `name`, given their gradient; `rates` multiplies `lr`."""
        torch._fused_adam_(  # pyright: ignore[reportPrivateImportUsage]
            [self.parameters.named()[name][rows]],
            [gradient],
            [self.mean[name][rows]],
            [self.square[name][rows]],
            [],
            [self.steps],
            lr=lr * self.rates[name],
            beta1=BETAS[0],
            beta2=BETAS[1],
            weight_decay=0.0,
            eps=EPSILON,
            amsgrad=False,
            maximize=False,
        )


def apply(adam: Adam, gradients: Gradients, lr: float, clip_norm: float | None = None) -> None:
    """One optimizer step: clip, project the decoder's gradient, Adam, renormalise the decoder."""
    scale = 1.0 if clip_norm is None else clip_scale(adam.parameters, gradients, clip_norm)
    adam.steps += 1
    W_dec = adam.parameters.W_dec
    for block in gradients.blocks():
        rows = W_dec[block.rows]
        project(block.W_dec, block.along, rows)
        for name in ("W_enc", "b_enc", "W_dec"):
            gradient = getattr(block, name)
            adam.update(name, gradient if scale == 1.0 else gradient.mul_(scale), lr, block.rows)
        renormalise(rows)
        del block, gradient  # the next block takes their memory
    for name, gradient in gradients.shared.items():
        adam.update(name, gradient if scale == 1.0 else gradient * scale, lr)


def project(gradient: Tensor, along: Tensor, rows: Tensor) -> None:
    """Remove in place the component of each row of `gradient` along the unit row of `rows`; `along` is its length."""
    gradient.addcmul_(rows, along[:, None], value=-1)


def renormalise(rows: Tensor) -> None:
    """Give each row unit norm, in place."""
    rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True))


def clip_scale(parameters: Parameters, gradients: Gradients, clip_norm: float) -> float:
    """min(1, clip_norm / norm of all gradients), the decoder's after projection.

    Computes every block twice instead of keeping all: few runs clip, and all blocks need much memory.
    """
    squares = [gradient.double().square().sum() for gradient in gradients.shared.values()]
    for block in gradients.blocks():
        project(block.W_dec, block.along, parameters.W_dec[block.rows])
        squares += [gradient.double().square().sum() for gradient in block[1:4]]
    norm = torch.stack(squares).sum().sqrt().item()  # sync: only with clipping
    return min(1.0, clip_norm / norm) if norm > 0 else 1.0

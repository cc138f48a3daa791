"""Gradients of a training step, in blocks of latents.

A step allocates nothing of the size of a weight matrix. A block is computed, used by the optimizer
while it is in the cache, and freed. (At 18,432 x 2,304 the allocation of a gradient alone takes 0.1 s.)
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from common.processes import Processes
from train.step.losses import StepValues
from transcoder.transcoder import Parameters


class Block(NamedTuple):
    """Gradients of latents [start, start + len(b_enc))."""

    start: int
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    along: Tensor
    """[n] <gradient of W_dec[f], W_dec[f]>: the component that the unit norm removes."""

    def copy(self) -> "Block":
        """The same in memory of its own."""
        return Block(self.start, *(gradient.clone() for gradient in self[1:]))

    @property
    def rows(self) -> slice:
        """The latents as a slice of the parameters."""
        return slice(self.start, self.start + len(self.b_enc))


class Gradients(NamedTuple):
    """The gradients of one training step."""

    shared: dict[str, Tensor]
    """b_dec, and W_skip if the transcoder has one."""
    blocks: Callable[[], Iterator[Block]]
    """Yields every latent once, in order, in blocks that the caller may change. Can be called again until a block has
    changed the parameters."""

    def over(self, peers: Processes) -> "Gradients":
        """These gradients summed over all processes."""
        if peers.world == 1:
            return self

        def blocks() -> Iterator[Block]:
            for block in self.blocks():
                for gradient in block[1:]:
                    peers.total(gradient)
                yield block

        return Gradients({name: peers.total(gradient) for name, gradient in self.shared.items()}, blocks)

    def plus(self, b_enc: Tensor) -> "Gradients":
        """These gradients with `b_enc` [F] added to the biases'."""

        def blocks() -> Iterator[Block]:
            for block in self.blocks():
                block.b_enc.add_(b_enc[block.rows])
                yield block

        return Gradients(self.shared, blocks)

    def whole(self) -> dict[str, Tensor]:
        """All gradients by parameter name, each in one tensor. Only tests need them so."""
        blocks = list(self.blocks())
        names = ("W_enc", "b_enc", "W_dec")
        return {name: torch.cat([getattr(block, name) for block in blocks]) for name in names} | self.shared


@runtime_checkable
class Step(Protocol):
    """The forward and backward pass of a training step; dense.py, sparse.py and matrix.py have one each."""

    def __call__(
        self,
        parameters: Parameters,
        x: Tensor,
        y: Tensor,
        dead: Tensor,
        k: int,
        weights: Tensor | None = None,
    ) -> tuple[StepValues, Gradients]:
        """Values and gradients on rows x [B, D_in], y [B, D_out]; `dead` holds the dead latents' indices.

        `k`: active latents per row. `weights` [B]: of each row's squared error in both losses; None: all 1. The values
        cover all peers' rows, the gradients this process's part of them.
        """
        ...

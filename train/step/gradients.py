"""Gradients of a training step, handed over in blocks of latents.

Nothing of the size of a weight matrix is allocated per step: a block is computed, used by the
optimizer while it is in the cache, and forgotten. (At 18,432 x 2,304 a fresh gradient costs 0.1 s
to allocate alone.)
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from common.processes import Processes


class Block(NamedTuple):
    """Gradients of latents [start, start + len(b_enc))."""

    start: int
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    along: Tensor
    """[n] <gradient of W_dec[f], W_dec[f]>: what the unit norm removes of it."""

    @property
    def rows(self) -> slice:
        """The latents as a slice of the parameters."""
        return slice(self.start, self.start + len(self.b_enc))


class Gradients(NamedTuple):
    """Of one training step."""

    shared: dict[str, Tensor]
    """b_dec, and W_skip where there is one."""
    blocks: Callable[[], Iterator[Block]]
    """Every latent once, in order. May be called again as long as no block was used to change parameters."""

    def over(self, peers: Processes) -> "Gradients":
        """The sum of all processes' gradients."""
        if peers.world == 1:
            return self

        def blocks() -> Iterator[Block]:
            for block in self.blocks():
                for gradient in block[1:]:
                    peers.total(gradient)
                yield block

        return Gradients({name: peers.total(gradient) for name, gradient in self.shared.items()}, blocks)

    def plus(self, b_enc: Tensor) -> "Gradients":
        """The same, and `b_enc` [F] added to the biases' gradients."""

        def blocks() -> Iterator[Block]:
            for block in self.blocks():
                block.b_enc.add_(b_enc[block.rows])
                yield block

        return Gradients(self.shared, blocks)

    def whole(self) -> dict[str, Tensor]:
        """All gradients by parameter name, at their full size (tests)."""
        blocks = list(self.blocks())
        names = ("W_enc", "b_enc", "W_dec")
        return {name: torch.cat([getattr(block, name) for block in blocks]) for name in names} | self.shared

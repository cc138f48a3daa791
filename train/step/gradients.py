"""Gradients of a training step, in blocks of latents.

A step allocates nothing of the size of a weight matrix. A block is computed, used by the optimizer
while it is in the cache, and freed. (At 18,432 x 2,304 the allocation of a gradient alone takes 0.1 s.)
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from common.processes import Processes
from train.step.losses import Objective, StepValues
from transcoder.transcoder import Parameters

PARTS = 3
"""Collectives that sum the gradients of all latents over several processes. A GPU has one block, so one."""


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
    """Yields every latent once, in order. Can be called again until a block or the parameters have been changed."""

    def over(self, peers: Processes, d_sae: int) -> "Gradients":
        """These gradients, of `d_sae` latents, summed over all processes in at most PARTS + 1 collectives.

        The sums of all latents are kept until the step has used them.
        """
        if peers.world == 1:
            return self
        flat = peers.total(_flat(self.shared.values()))
        parts = flat.split([gradient.numel() for gradient in self.shared.values()])
        named = zip(self.shared.items(), parts, strict=True)
        summed: list[Block] = []

        def blocks() -> Iterator[Block]:
            if not summed:
                summed.extend(_summed(self.blocks(), d_sae, peers))
            yield from summed

        return Gradients({name: part.view_as(gradient) for (name, gradient), part in named}, blocks)

    def plus(self, b_enc: Tensor) -> "Gradients":
        """These gradients with `b_enc` [F] added to the biases'."""

        def blocks() -> Iterator[Block]:
            for block in self.blocks():
                yield block._replace(b_enc=block.b_enc + b_enc[block.rows])
                del block  # the next one takes its memory

        return Gradients(self.shared, blocks)

    def whole(self) -> dict[str, Tensor]:
        """All gradients by parameter name, each in one tensor. Only tests need them so."""
        blocks = list(self.blocks())
        names = ("W_enc", "b_enc", "W_dec")
        return {name: torch.cat([getattr(block, name) for block in blocks]) for name in names} | self.shared


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def _summed(blocks: Iterator[Block], d_sae: int, peers: Processes) -> Iterator[Block]:
    """The sums of all processes' blocks, in PARTS parts: each is sent while the next one is computed."""
    sent: list[tuple[list[tuple[int, list[torch.Size]]], Tensor, Callable[[], object]]] = []
    part: list[Block] = []
    for block in blocks:
        part.append(block)
        if PARTS * block.rows.stop >= (len(sent) + 1) * d_sae:
            shapes = [(each.start, [gradient.shape for gradient in each[1:]]) for each in part]
            flat = _flat(gradient for each in part for gradient in each[1:])
            sent.append((shapes, flat, peers.total_later(flat)))
            part = []
    for shapes, flat, wait in sent:
        wait()
        pieces = iter(flat.split([shape.numel() for _, block in shapes for shape in block]))
        for start, block in shapes:
            yield Block(start, *(next(pieces).view(shape) for shape in block))


@runtime_checkable
class Step(Protocol):
    """The forward and backward pass of a training step; dense.py, sparse.py and matrix.py have one each."""

    objective: Objective
    """Of the latents that this process holds."""

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

        `parameters` and `dead` are those of the latents that this process holds. `k`: active latents per row.
        `weights` [B]: of each row's squared error in both losses; None: all 1. The values cover the rows and latents of
        all processes, the gradients this process's part of them.
        """
        ...

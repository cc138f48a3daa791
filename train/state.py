"""All that changes while a run trains, and its form on disk.

Shapes: F latents, G prefixes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from common.device import constant
from common.processes import ALONE, Processes
from train.activation_samples import Samples
from train.step.optimizer import Adam
from transcoder.transcoder import Parameters

THRESHOLD_AVERAGE = 0.01
"""Weight of the newest cut in its moving average, which is logged as the threshold."""
DENSITY_AVERAGE = 0.02
"""Weight of the newest batch in a latent's density: an average over about 50 batches."""


SHARED = ("b_dec", "W_skip", "adam.steps", "kept")
"""How the names end of tensors that every process has whole; of the others it has the rows of its latents."""

COUNTS = ("kept_rows", "step", "rows", "epoch", "batch")
"""Attributes of a state that are numbers from 0 on."""


@dataclass
class State:
    """All that changes while a run trains."""

    parameters: Parameters
    """In normalised space, changed in place."""
    adam: Adam
    last_fired: Tensor
    """[F] int64: number of rows seen when each latent last fired. F counts the latents that this process holds."""
    density: Tensor
    """[F] float32: share of the rows on which each latent fires, a moving average over batches."""
    failed: Tensor
    """[1] float64: 0, and NaN from the first step on whose loss was not finite: then Adam changes nothing. Not saved: a
    failed run ends."""
    kept: Tensor
    """[G] float64: number of activations that the selection kept in each prefix, in the last tenth of training."""
    kept_rows: int = 0
    """Rows over which `kept` was counted."""
    step: int = 0
    """Steps finished."""
    rows: int = 0
    """Rows seen."""
    epoch: int = 0
    """The loader continues with batch `batch` of this epoch."""
    batch: int = 0
    threshold: Tensor | None = None
    """Moving average of the cuts, in normalised space, float64."""

    samples: Samples | None = None
    """Strongest rows of each latent; None if the run collects none."""
    newest: tuple[Tensor, int] | None = None
    """Of the newest step: number of activations kept in each prefix [G] int64, and of rows."""
    n_dead: int = 0
    """Dead latents in the newest step."""

    @classmethod
    def start(
        cls,
        parameters: Parameters,
        prefix_ends: Sequence[int],
        sampled: bool = False,
        latents: slice | None = None,
    ) -> "State":
        """The state before the first step; `latents`: which of those below the last prefix end it holds; None: all."""
        device = parameters.W_enc.device
        last_fired = torch.zeros(len(parameters.b_enc), dtype=torch.int64, device=device)
        density = torch.zeros(len(parameters.b_enc), device=device)
        kept = torch.zeros(len(prefix_ends), dtype=torch.float64, device=device)
        samples = Samples(len(parameters.b_enc), device) if sampled else None
        failed = torch.zeros(1, dtype=torch.float64, device=device)
        adam = Adam(parameters, prefix_ends, latents)
        return cls(parameters, adam, last_fired, density, failed, kept, samples=samples)

    def note_failure(self, loss: Tensor) -> None:
        """Let Adam change nothing from here on if the loss is not finite. The host does not wait to know."""
        self.failed.add_(loss, alpha=0)  # 0 times infinity or NaN is NaN, and stays
        torch.ne(self.failed, self.failed, out=self.adam.skip)

    def count(
        self,
        cut: Tensor,
        fired: Tensor,
        prefix_ends: tuple[int, ...],
        rows: int,
        counting: int,
        holders: Processes = ALONE,
    ) -> None:
        """Record one step: its cut, how often each latent fired [F], the number of rows.

        `kept` adds up from step `counting` on, over the latents of all `holders`. Nothing here makes the host wait for
        a GPU.
        """
        ends = constant(prefix_ends, torch.int64, fired.device)
        kept = holders.total(pad(fired.cumsum(0), (1, 0))[ends])
        self.density.lerp_((fired / rows).to(self.density), DENSITY_AVERAGE)
        self.last_fired.masked_fill_(fired > 0, self.rows + rows)
        cut = cut.double()
        self.threshold = cut if self.threshold is None else self.threshold.lerp(cut, THRESHOLD_AVERAGE)
        self.newest = kept, rows
        if self.step == counting:
            self.kept.zero_()
            self.kept_rows = 0
        if self.step >= counting:
            self.kept += kept
            self.kept_rows += rows
        self.step += 1
        self.rows += rows

    def dead(self, after_rows: int) -> Tensor:
        """Ascending indices of the dead latents: those that have not fired for more than `after_rows` rows."""
        return (self.last_fired < self.rows - after_rows).nonzero().squeeze(1)  # sync: how many are dead

    def tensors(self) -> dict[str, Tensor]:
        """The tensors to save, by name; not copies."""
        named = {f"parameters.{name}": tensor for name, tensor in self.parameters.named().items()}
        named |= {f"adam.mean.{name}": tensor for name, tensor in self.adam.mean.items()}
        named |= {f"adam.square.{name}": tensor for name, tensor in self.adam.square.items()}
        if self.samples is not None:
            named |= {"samples.values": self.samples.values, "samples.rows": self.samples.rows}
        counters = {"last_fired": self.last_fired, "density": self.density, "kept": self.kept}
        return named | {"adam.steps": self.adam.steps} | counters

    def scalars(self) -> dict[str, Any]:
        """The numbers to save, by name."""
        threshold = None if self.threshold is None else float(self.threshold)
        return {name: getattr(self, name) for name in COUNTS} | {"threshold": threshold}

    def restore(self, tensors: dict[str, Tensor], scalars: dict[str, Any]) -> None:
        """Copy a checkpoint's values into this state, in place; raises `ValueError` naming what does not fit."""
        device = self.last_fired.device
        if self.samples is None and "samples.values" in tensors:
            self.samples = Samples(
                len(self.last_fired), device
            )  # train.sample_every is 0 now: what there is stays
        # Where train.sample_every was 0 then, samples are collected from here on.
        unsampled = not any(name.startswith("samples.") for name in tensors)
        for name, tensor in self.tensors().items():
            if unsampled and name.startswith("samples."):
                continue
            stored = tensors.get(name)
            if stored is None or stored.shape != tensor.shape:
                shape = "none" if stored is None else list(stored.shape)
                raise ValueError(f"tensor {name}: expected shape {list(tensor.shape)}, found {shape}")
            tensor.copy_(stored)
        if lacking := self.scalars().keys() - scalars.keys():
            raise ValueError(f"no value of {min(lacking)}")
        for name in self.scalars():
            setattr(self, name, scalars[name])
        if self.threshold is not None:
            self.threshold = torch.tensor(self.threshold, dtype=torch.float64, device=device)

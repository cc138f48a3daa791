"""All that changes while a run trains, and its form on disk.

Shapes: F latents, G prefixes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.device import constant
from train.activation_samples import Samples
from train.step.optimizer import Adam
from transcoder.transcoder import Parameters

THRESHOLD_AVERAGE = 0.01
"""Weight of the newest cut in its moving average, which is logged as the threshold."""
DENSITY_AVERAGE = 0.02
"""Weight of the newest batch in a latent's density: an average over about 50 batches."""


@dataclass
class State:
    """All that changes while a run trains."""

    parameters: Parameters
    """In normalised space, changed in place."""
    adam: Adam
    last_fired: Tensor
    """[F] int64: number of rows seen when each latent last fired."""
    density: Tensor
    """[F] float32: share of the rows on which each latent fires, a moving average over batches."""
    failed: Tensor
    """[2] int64: first step whose loss was not finite, 0 if none was; its first prefix of which that holds, or G.
    From that step on no update changes the parameters. Not saved: a failed run ends."""
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
    newest_l0: Tensor | None = None
    """Active latents per row in the newest step."""
    n_dead: int = 0
    """Dead latents in the newest step."""

    @classmethod
    def start(cls, parameters: Parameters, prefix_ends: Sequence[int], sampled: bool = False) -> "State":
        """The state before the first step."""
        device = parameters.W_enc.device
        last_fired = torch.zeros(len(parameters.b_enc), dtype=torch.int64, device=device)
        density = torch.zeros(len(parameters.b_enc), device=device)
        kept = torch.zeros(len(prefix_ends), dtype=torch.float64, device=device)
        samples = Samples(len(parameters.b_enc), device) if sampled else None
        failed, adam = torch.zeros(2, dtype=torch.int64, device=device), Adam(parameters, prefix_ends)
        return cls(parameters, adam, last_fired, density, failed, kept, samples=samples)

    def note_failure(self, loss: Tensor, squared_errors: Tensor) -> Tensor:
        """Record in `failed` if this step's is the first loss that is not finite; [1] float32, 1 after a failure."""
        bad = ~torch.isfinite(torch.cat([squared_errors, loss.view(1)]))
        prefix = bad.int().argmax()  # the loss alone: G
        now = torch.stack([torch.full_like(prefix, self.step + 1), prefix])
        self.failed = torch.where(bad.any() & (self.failed[0] == 0), now, self.failed)
        return (self.failed[:1] > 0).float()

    def count(
        self, cut: Tensor, fired: Tensor, prefix_ends: tuple[int, ...], rows: int, counting: int
    ) -> None:
        """Record one step: its cut, how often each latent fired [F], the number of rows.

        `kept` adds up from step `counting` on. Nothing here makes the host wait for a GPU.
        """
        last = constant(tuple(end - 1 for end in prefix_ends), torch.int64, fired.device)
        kept = fired.double().cumsum(0)[last]
        self.density.lerp_((fired / rows).to(self.density), DENSITY_AVERAGE)
        self.last_fired = torch.where(fired > 0, self.rows + rows, self.last_fired)
        cut = cut.double()
        old = cut if self.threshold is None else self.threshold
        self.threshold = old + THRESHOLD_AVERAGE * (cut - old)
        self.newest_l0 = kept[-1] / rows
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
        names = ("kept_rows", "step", "rows", "epoch", "batch")
        threshold = None if self.threshold is None else float(self.threshold)
        return {name: getattr(self, name) for name in names} | {"threshold": threshold}

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

"""Activation samples: each latent's strongest rows among the batches that were looked at.

Shapes: F latents, N samples per latent, E active entries of a batch.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transcoder.entries import Entries

PER_LATENT = 10


class Samples:
    """The N strongest rows of each latent so far, strongest first."""

    def __init__(self, d_sae: int, device: torch.device) -> None:
        self.values: Float[Tensor, "F N"] = torch.zeros(d_sae, PER_LATENT, device=device)
        """Activations as they were when the row was seen, in normalised space; 0 where there is none."""
        self.rows: Int[Tensor, "F N"] = torch.full((d_sae, PER_LATENT), -1, device=device)
        """Numbers of the rows in the train split; -1 where there is none."""

    def collect(self, entries: Entries, row_numbers: Int[Tensor, " B"]) -> None:
        """Take in a batch's active entries; of a row that was sampled before, the new value counts."""
        touched, values, rows = strongest(entries, row_numbers)
        old_values, old_rows = self.values[touched], self.rows[touched]
        again = (old_rows[:, :, None] == rows[:, None, :]).any(2)
        values = torch.cat([old_values.masked_fill(again, 0.0), values], 1)
        rows = torch.cat([old_rows, rows], 1)
        top = values.topk(PER_LATENT, dim=1)
        self.values[touched] = top.values
        self.rows[touched] = rows.gather(1, top.indices).masked_fill(top.values == 0, -1)


def strongest(entries: Entries, row_numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(latents [T] that fired, their largest values [T, N], the rows [T, N] these came from).

    Two sorts instead of a loop over latents: by value, then, stable, by latent.
    """
    by_value = entries.values.sort(descending=True, stable=True).indices
    latents, order = entries.latents[by_value].sort(stable=True)
    order = by_value[order]
    touched, slot, counts = latents.unique_consecutive(return_inverse=True, return_counts=True)
    rank = torch.arange(len(latents), device=latents.device) - (counts.cumsum(0) - counts)[slot]
    kept = rank < PER_LATENT
    slot, rank, order = slot[kept], rank[kept], order[kept]
    values = entries.values.new_zeros(len(touched), PER_LATENT)
    rows = torch.full((len(touched), PER_LATENT), -2, device=latents.device)  # matches no row, nor "none"
    values[slot, rank] = entries.values[order]
    rows[slot, rank] = row_numbers[entries.rows[order]]
    return touched, values, rows

"""Activation samples: each latent's strongest rows among the sampled batches.

Shapes: F latents, N samples per latent, E active entries of a batch.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transcoder.entries import Entries, strongest

PER_LATENT = 10


class Samples:
    """The N strongest rows of each latent so far, strongest first."""

    def __init__(self, d_sae: int, device: torch.device) -> None:
        self.values: Float[Tensor, "F N"] = torch.zeros(d_sae, PER_LATENT, device=device)
        """Activations as they were when the row was seen, in normalised space; 0 where there is none."""
        self.rows: Int[Tensor, "F N"] = torch.full((d_sae, PER_LATENT), -1, device=device)
        """Numbers of the rows in the train split; -1 where there is none."""

    def collect(self, entries: Entries, row_numbers: Int[Tensor, " B"]) -> None:
        """Take in a batch's active entries. A row that was sampled before takes its new value."""
        touched, values, rows = _newest(entries, row_numbers)
        old_values, old_rows = self.values[touched], self.rows[touched]
        again = (old_rows[:, :, None] == rows[:, None, :]).any(2)
        values = torch.cat([old_values.masked_fill(again, 0.0), values], 1)
        rows = torch.cat([old_rows, rows], 1)
        top = values.topk(PER_LATENT, dim=1)
        self.values[touched] = top.values
        self.rows[touched] = rows.gather(1, top.indices).masked_fill(top.values == 0, -1)


def _newest(entries: Entries, row_numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(latents [T] that fired, their largest values [T, N], the rows [T, N] of these values); N = PER_LATENT.

    >>> entries = Entries(torch.tensor([0, 0, 1]), torch.tensor([2, 5, 5]), torch.tensor([0.5, 0.25, 0.75]), n_rows=2)
    >>> latents, values, rows = _newest(entries, row_numbers=torch.tensor([40, 41]))
    >>> latents.tolist(), values[:, :2].tolist(), rows[:, :3].tolist()  # -2: no further row
    ([2, 5], [[0.5, 0.0], [0.75, 0.25]], [[40, -2, -2], [41, 40, -2]])
    """
    ranks = entries.values.view(torch.int32)  # positive float32 values have the order of their bits
    order = strongest(entries.latents, ranks, PER_LATENT)
    touched, slot, counts = entries.latents[order].unique_consecutive(return_inverse=True, return_counts=True)
    nth = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[slot]
    values = entries.values.new_zeros(len(touched), PER_LATENT)
    rows = torch.full((len(touched), PER_LATENT), -2, device=order.device)  # matches no row, nor "none"
    values[slot, nth] = entries.values[order]
    rows[slot, nth] = row_numbers[entries.rows[order]]
    return touched, values, rows

"""Every firing of every latent on a split's rows, in memory, by latent.

Shapes: n rows, F latents, E firings.
"""

from dataclasses import dataclass

import numpy as np
import torch

from common.errors import InputError
from common.progress import progress
from evaluate.metrics.rows import Split, blocks
from transcoder import Transcoder

MOST = 1 << 25
"""Firings that are held: 8 bytes each, 40 while they are sorted, so 1.3 GB. 350,000 rows of 96 active latents."""


@dataclass(frozen=True)
class Firings:
    """Sorted by latent, then activation, weakest first; equal ones by row."""

    rows: np.ndarray
    """[E] int32"""
    values: np.ndarray
    """[E] float32, all positive"""
    bounds: np.ndarray
    """[F + 1] int64: firings of latent f are [bounds[f], bounds[f + 1])."""
    n_rows: int

    def of(self, latent: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows, activations) of a latent's firings."""
        own = slice(self.bounds[latent], self.bounds[latent + 1])
        return self.rows[own], self.values[own]


@torch.inference_mode()
def firings(coder: Transcoder, split: Split, n_rows: int) -> Firings:
    """One reading of rows [0, n_rows). `InputError` where they have more firings than fit into memory."""
    device, keys, rows = coder.W_dec.device, [], []
    with progress("firings", n_rows, "rows") as bar:
        for start, stop in blocks(n_rows):
            inputs, _ = split.rows(start, stop)
            entries = coder.active(inputs.to(device))
            bits = entries.values.float().view(torch.int32).long()  # of positive floats: in their order
            keys.append(((entries.latents << 32) | bits).cpu())
            rows.append((entries.rows + start).int().cpu())
            if start == 0:
                _refuse_too_many(len(bits), stop, n_rows)
            bar.update(stop - start)
    ordered, order = torch.cat(keys).sort(stable=True)
    keys.clear()
    return Firings(
        rows=torch.cat(rows)[order].numpy(),
        values=(ordered & 0xFFFFFFFF).int().view(torch.float32).numpy(),
        bounds=torch.searchsorted(ordered, torch.arange(coder.d_sae + 1) << 32).numpy(),
        n_rows=n_rows,
    )


def _refuse_too_many(found: int, of: int, n_rows: int) -> None:
    """`found` firings on the first `of` rows: `InputError` if all `n_rows` have more than are held."""
    if found * n_rows > MOST * of:
        fitting = max(MOST * of // found, 1)
        raise InputError(
            f"rows: expected at most about {fitting:,}, as {found / of:.0f} latents are active on a row and {MOST:,} "
            f"firings are held in memory, found {n_rows:,}; give rows={fitting}, or a coarser prefix"
        )

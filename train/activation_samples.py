"""Activation samples: each latent's strongest rows among the sampled batches, and their file with text.

Shapes: F latents, N samples per latent, E active entries of a batch.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from common.files import whole
from common.processes import Processes
from common.tokens import TokenText
from shards import Store
from shards.layout import SHARD_ROWS
from shards.reader import Contexts
from shards.store import read_tokenizer
from train.samples_page import AROUND, Text
from transcoder.entries import Entries, strongest

PER_LATENT = 10


class Samples:
    """The N strongest rows of each latent so far, strongest first."""

    def __init__(self, d_sae: int, device: torch.device) -> None:
        self.values: Float[Tensor, "F N"] = torch.zeros(d_sae, PER_LATENT, device=device)
        """Activations as they were when the row was seen, in normalised space; 0 where there is none."""
        self.rows: Int[Tensor, "F N"] = torch.full((d_sae, PER_LATENT), -1, device=device)
        """Numbers of the rows in the train split; -1 where there is none."""

    def of_all(self, holders: Processes) -> "Samples":
        """The samples of the latents of all holders, in their order."""
        if holders.world == 1:
            return self
        everyones = Samples(0, self.values.device)
        everyones.values = holders.gathered(self.values.flatten()).view(-1, PER_LATENT)
        everyones.rows = holders.gathered(self.rows.flatten()).view(-1, PER_LATENT)
        return everyones

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


def write(
    run_dir: Path, samples: Samples, store: Store, prefix_ends: tuple[int, ...], scale_out: float
) -> None:
    """Add context and text to the samples and write them; the file appears whole."""
    values, rows = samples.values.cpu().numpy() * scale_out, samples.rows.cpu().numpy()
    contexts, positions = _provenance(store, rows)
    texts = _texts(
        TokenText(read_tokenizer(store.tokenizer_path)),
        store.train.contexts,
        contexts[rows >= 0],
        positions[rows >= 0],
    )
    group = np.searchsorted(prefix_ends, np.arange(len(values)), side="right")
    file = run_dir / "activation_samples" / "samples.jsonl"
    with whole(file) as out:
        for latent in range(len(values)):
            examples = [
                {
                    "value": round(float(values[latent, i]), 5),
                    "row": int(rows[latent, i]),
                    "context": int(contexts[latent, i]),
                    "position": int(positions[latent, i]),
                    **next(texts),
                }
                for i in np.flatnonzero(rows[latent] >= 0)
            ]
            line = {"latent": latent, "group": int(group[latent]), "samples": examples}
            out.write(json.dumps(line).encode() + b"\n")


def _provenance(store: Store, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(context, position) of each row number; windows of the store that hold none are not read."""
    contexts, positions = np.full(rows.shape, -1, np.int64), np.full(rows.shape, -1, np.int64)
    for window in np.unique(rows[rows >= 0] // SHARD_ROWS):
        start = int(window) * SHARD_ROWS
        context, position = store.train.provenance(start, min(start + SHARD_ROWS, len(store.train)))
        here = (rows >= start) & (rows < start + SHARD_ROWS)
        contexts[here], positions[here] = context[rows[here] - start], position[rows[here] - start]
    return contexts, positions


def _texts(
    text: TokenText,
    table: Contexts | np.ndarray,
    contexts: np.ndarray,
    positions: np.ndarray,
    block: int = 1000,
) -> Iterator[Text]:
    """Text before, of and after each token; contexts are read in blocks."""
    for start in range(0, len(contexts), block):
        tokens = table[contexts[start : start + block]]
        for line, at in zip(tokens, positions[start : start + block].tolist(), strict=True):
            first = max(0, at - AROUND)
            pieces = text.pieces(line[first : at + 1 + AROUND].tolist())
            before, after = pieces[: at - first], pieces[at - first + 1 :]
            yield Text(before="".join(before), token=pieces[at - first], after="".join(after))

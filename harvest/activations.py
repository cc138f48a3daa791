"""Contexts -> (input, output) rows at the chosen layers, one window at a time.

Shapes: b contexts of a forward pass, T positions, D width, n rows of a window.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from common.errors import InputError
from harvest.lm import LanguageModel
from shards.layout import kept_mask
from shards.manifest import Source
from shards.reader import Contexts
from shards.writer import WindowRows

OVERFLOW = {
    "float16": "float16 ends at 65,504: give --model.dtype bfloat16, or float32 where there is no bfloat16 (and "
    "HARVEST=name once a window is written)",
    "bfloat16": "the model's weights hold it, or this text drives it there",
    "float32": "the model's weights hold it, or this text drives it there",
}
"""What to say of an activation that is not finite, by the precision it was computed in."""


@dataclass(frozen=True)
class Kept:
    """Which positions of a split give rows, counted context by context."""

    contexts: Contexts
    dropped_token_ids: list[int]
    before: np.ndarray
    """[C + 1] int64: kept positions before each context."""

    @classmethod
    def count(cls, contexts: Contexts, dropped_token_ids: list[int]) -> "Kept":
        """Read all of a split's contexts once, 512 at a time."""
        before = np.zeros(len(contexts) + 1, np.int64)
        for start in range(0, len(contexts), 512):
            block = contexts[start : start + 512]
            before[start + 1 : start + 1 + len(block)] = kept_mask(block, dropped_token_ids).sum(axis=1)
        return cls(contexts, dropped_token_ids, np.cumsum(before))

    def batches(self, window: range, batch_size: int) -> Iterator["Positions"]:
        """The contexts of `window` in order, `batch_size` at a time, with the positions that belong to it."""
        first = int(np.searchsorted(self.before, window.start, side="right")) - 1
        last = int(np.searchsorted(self.before, window.stop, side="left"))
        for start in range(first, last, batch_size):
            numbers = np.arange(start, min(start + batch_size, last))
            tokens = self.contexts[numbers]
            context, position = np.nonzero(kept_mask(tokens, self.dropped_token_ids))
            kept = self.before[start] + np.arange(len(context))
            here = (kept >= window.start) & (kept < window.stop)
            yield Positions(tokens, context[here], position[here], start, kept[here] - window.start)


@dataclass(frozen=True)
class Positions:
    """One forward pass and the rows of the window it gives."""

    tokens: np.ndarray
    """[b, T] int32"""
    context: np.ndarray
    """[m] row of `tokens`"""
    position: np.ndarray
    """[m] column of `tokens`"""
    first_context: int
    kept: np.ndarray
    """[m] number within the window, before it is shuffled"""


def fill_window(
    model: LanguageModel,
    batches: Iterator[Positions],
    order: np.ndarray,
    caught: dict[str, torch.Tensor],
    targets: list[tuple[Source, WindowRows]],
    on_batch: Callable[[int], object],
) -> None:
    """Run the model over a window's contexts and put each row where `order` [n] says, for every layer at once.

    Raises `InputError` naming layer and context when an activation is NaN or infinite.
    """
    deepest = max(source.layer for source, _ in targets)
    for batch in batches:
        caught.clear()
        model.run_blocks(torch.from_numpy(batch.tokens).long(), deepest)
        places = order[batch.kept]
        for source, rows in targets:
            for name, into in ((source.input_hook, rows.inputs), (source.output_hook, rows.outputs)):
                into[places] = _rows_of(caught, name, batch, source)
            rows.context[places] = batch.first_context + batch.context
            rows.position[places] = batch.position
        on_batch(len(places))


def _rows_of(caught: dict[str, torch.Tensor], name: str, batch: Positions, source: Source) -> np.ndarray:
    """[m, D] float32 of one hook point at the batch's kept positions."""
    tensor = caught.get(name)
    if tensor is None or tensor.shape[:2] != batch.tokens.shape:
        shape = "nothing" if tensor is None else tuple(tensor.shape)
        raise InputError(
            f"hook {name}: expected {batch.tokens.shape} positions, found {shape}; it did not fire"
        )
    places = torch.from_numpy(batch.context * batch.tokens.shape[1] + batch.position).to(tensor.device)
    rows = tensor.flatten(0, 1).index_select(0, places).float().cpu()
    # One pass over the rows says that all are finite; only where it does not, each row is looked at.
    if not torch.isfinite(rows.sum()) and not (finite := torch.isfinite(rows).all(dim=1)).all():
        row = int((~finite).nonzero()[0])
        raise InputError(
            f"layer {source.layer}, {name}: NaN or infinity in context {batch.first_context + batch.context[row]} "
            f"position {batch.position[row]} with model.dtype {source.dtype}; {OVERFLOW[source.dtype]}"
        )
    return rows.numpy()

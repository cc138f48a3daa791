"""Contexts -> (input, output) rows at the chosen layers, one window at a time.

Shapes: b contexts of a forward pass, T positions, D width, n rows of a window.
"""

from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from common.errors import InputError
from common.hooks import BEFORE_NORM, layer_of
from harvest.lm import LanguageModel
from shards.device.column import DeviceColumn
from shards.device.copies import sent
from shards.encode import Column
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


class Intake:
    """Takes in what a forward pass gives and puts each row into its window: no layer's tensors wait for the last one.

    A layer whose activations are not finite is in `failed`, and is not taken in again. Of rows that stay on the model's
    device nothing is looked at here, which would take waiting for it: `refuse_unfinite` does it later.
    """

    def __init__(self) -> None:
        self.failed: dict[int, InputError] = {}
        self._places: dict[str, tuple[Source, Column | DeviceColumn]] = {}
        self._index: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}
        """On a device, of this batch: kept positions, and the places where their rows go."""
        self._before: dict[int, torch.Tensor] = {}
        """[m, D] by layer: what its norm has read."""

    def begin(self, batch: Positions, places: np.ndarray, targets: list[tuple[Source, WindowRows]]) -> None:
        """A forward pass over `batch` comes; its rows [m] go to `places` of the windows."""
        self._batch, self._to = batch, places
        self._before.clear()
        self._index.clear()
        self._places = {
            name: (source, column)
            for source, rows in targets
            for name, column in ((source.input_hook, rows.inputs), (source.output_hook, rows.outputs))
        }

    def take(self, name: str, tensor: torch.Tensor) -> None:
        """What is at a hook point, [b, T, D]."""
        if name.endswith(BEFORE_NORM):
            self._before[layer_of(name)] = _kept(tensor, self._batch)
            return
        if (place := self._places.get(name)) is None:
            return
        source, column = place
        if tensor.shape[:2] != self._batch.tokens.shape:
            return  # `end` says so
        del self._places[name]
        before = self._before.pop(source.layer, None) if name == source.input_hook else None
        if source.layer in self.failed:
            return
        if isinstance(column, DeviceColumn):
            kept, places = self._on(tensor.device)
            column.put(places, tensor.flatten(0, 1).index_select(0, kept))
            return
        try:
            column.put(self._to, *_held(_finite(tensor, name, self._batch, source), before))
        except InputError as error:
            self.failed[source.layer] = error

    def _on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if device not in self._index:
            kept = torch.from_numpy(_numbers(self._batch))
            self._index[device] = sent(kept, device), sent(torch.from_numpy(self._to), device)
        return self._index[device]

    def end(self) -> None:
        """The forward pass is over; raises `InputError` for a hook that did not fire."""
        for name in self._places:
            raise InputError(
                f"hook {name}: expected {self._batch.tokens.shape} positions, found nothing of that shape; it did not "
                "fire"
            )


def hooks_for(model: LanguageModel, sources: Iterable[Source], on_device: Container[int] = ()) -> list[str]:
    """The hook points that an `Intake` wants of a model for these sources; `on_device`: layers that stay there."""
    names = {hook for source in sources for hook in (source.input_hook, source.output_hook)}
    if model.dtype.itemsize == 2:
        before = {
            f"blocks.{source.layer}.{BEFORE_NORM}"
            for source in sources
            if source.input == "normalized" and source.layer not in on_device
        }
        names |= {name for name in before if model.has_hook(name)}
    return sorted(names)


def fill_window(
    model: LanguageModel,
    batches: Iterator[Positions],
    order: np.ndarray,
    intake: Intake,
    targets: list[tuple[Source, WindowRows]],
    make_room: Callable[[int], object],
    on_batch: Callable[[int], object],
) -> None:
    """Run the model over a window's contexts and put each row where `order` [n] says, for every layer at once.

    `make_room` is called with the number of a batch's rows before they come, `on_batch` when they are there. Layers
    that fail are in `intake.failed`, and no more rows of theirs are put.
    """
    for batch in batches:
        left = [(source, rows) for source, rows in targets if source.layer not in intake.failed]
        if not left:
            return
        places = order[batch.kept]
        make_room(sum(rows.expect(len(places)) for _, rows in left))
        intake.begin(batch, places, left)
        model.run_blocks(torch.from_numpy(batch.tokens).long(), max(source.layer for source, _ in left))
        intake.end()
        for _, rows in left:
            rows.context[places] = batch.first_context + batch.context
            rows.position[places] = batch.position
        on_batch(len(places))


def _kept(tensor: torch.Tensor, batch: Positions) -> torch.Tensor:
    """[m, D] of [b, T, D]: the batch's kept positions."""
    places = torch.from_numpy(_numbers(batch))
    return tensor.flatten(0, 1).index_select(0, places.to(tensor.device))


def _numbers(batch: Positions) -> np.ndarray:
    """[m] int64: the kept positions, counted through all contexts of the batch."""
    return batch.context * batch.tokens.shape[1] + batch.position


def refuse_unfinite(source: Source, rows: WindowRows) -> None:
    """Raise `InputError` naming layer and context of NaN or infinity in rows that were quantised on a device."""
    for name, column in ((source.input_hook, rows.inputs), (source.output_hook, rows.outputs)):
        if isinstance(column, DeviceColumn) and len(found := column.unfinite()):
            first = found[np.lexsort((rows.position[found], rows.context[found]))[0]]
            raise _not_finite(source, name, int(rows.context[first]), int(rows.position[first]))


def _not_finite(source: Source, name: str, context: int, position: int) -> InputError:
    return InputError(
        f"layer {source.layer}, {name}: NaN or infinity in context {context} position {position} "
        f"with model.dtype {source.dtype}; {OVERFLOW[source.dtype]}"
    )


def _finite(tensor: torch.Tensor, name: str, batch: Positions, source: Source) -> torch.Tensor:
    """[m, D] at the batch's kept positions; raises `InputError` naming layer and context of NaN or infinity."""
    rows = _kept(tensor, batch)
    # One pass over the rows says that all are finite; only where it does not, each row is looked at.
    if (
        not torch.isfinite(rows.sum(dtype=torch.float32))
        and not (finite := torch.isfinite(rows).all(dim=1)).all()
    ):
        row = int((~finite).nonzero()[0])
        raise _not_finite(source, name, batch.first_context + batch.context[row], batch.position[row])
    return rows


def _held(rows: torch.Tensor, before: torch.Tensor | None) -> tuple[np.ndarray, np.ndarray | None]:
    """What a column holds of rows [m, D]: themselves, or where that is exact `before` and a number for each row."""
    scales = None
    if before is not None and rows.dtype == torch.float32 and before.dtype.itemsize == 2:
        scales = _factors(before, rows)
    if before is None or scales is None:
        return _numpy(rows), None
    return _numpy(before), scales.cpu().numpy()


def _factors(before: torch.Tensor, rows: torch.Tensor) -> torch.Tensor | None:
    """[m] float32 with rows == before * factor, to the last bit; None where there are none (a LayerNorm).

    Such a factor is the quotient of two elements to within a rounding error: that, and its neighbours, are tried.
    """
    wide = before.float()
    largest = wide.abs().argmax(dim=1, keepdim=True)
    factor = rows.gather(1, largest) / wide.gather(1, largest)
    factor = torch.where(torch.isfinite(factor), factor, torch.ones_like(factor))  # a row of zeros
    above, below = factor, factor
    found = (wide * factor == rows).all(dim=1, keepdim=True)
    for _ in range(2):
        if found.all():
            break
        above = torch.nextafter(above, torch.full_like(above, torch.inf))
        below = torch.nextafter(below, torch.zeros_like(below))
        for near in (above, below):
            fits = (wide * near == rows).all(dim=1, keepdim=True)
            factor, found = torch.where(fits & ~found, near, factor), found | fits
    return factor[:, 0] if found.all() else None


def _numpy(rows: torch.Tensor) -> np.ndarray:
    """As `Column.put` takes them; numpy has no bfloat16."""
    rows = rows.contiguous().cpu()
    if rows.dtype == torch.bfloat16:
        return rows.view(torch.int16).numpy().view(np.uint16)
    return rows.numpy() if rows.dtype in (torch.float16, torch.float32) else rows.float().numpy()

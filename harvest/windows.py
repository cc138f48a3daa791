"""Fill, compress and publish every missing window of every layer.

A window is compressed and written by background threads, its chunks side by side on all cores but one, while the
model fills the next one. Each chunk's memory goes back when it is compressed, and rows of the next window wait for
that: both windows together take an eighth more than one, however long the harvest.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from common.device import cores
from common.errors import InputError
from common.processes import Processes
from common.progress import progress
from common.settings import Harvest
from harvest.activations import Intake, Kept, fill_window, hooks_for
from harvest.lm import LanguageModel
from shards.layout import SHARD_ROWS, windows
from shards.manifest import SPLITS
from shards.writer import StoreWriter, WindowRows, stored_order

Window = tuple[str, int, range]
"""Split, number, kept positions."""


SLACK = 1 / 8
"""Share of a window that may be filled while nothing of the one before is compressed."""


def run_windows(
    model: LanguageModel,
    writers: list[StoreWriter],
    options: Harvest,
    after_first: Callable[[], None],
    processes: Processes,
) -> dict[int, InputError]:
    """Write what the stores lack; this process's share of it where there are several.

    `after_first` is called once, when the first window's real size is on disk. Returns what ended the work on a layer,
    by layer; the others are written to their ends.
    Raises what the model or a writing thread raised otherwise; the stores stay resumable.
    """
    missing = {writer: frozenset(writer.missing()) for writer in writers}
    processes.wait()  # everyone has looked before anyone writes
    work = [window for window in _all_windows(writers[0]) if any(window[:2] in m for m in missing.values())]
    work = work[processes.rank :: processes.world]
    writing_threads = min(len(writers), 4)
    intake, room = Intake(), Room(int(2 * len(writers) * SHARD_ROWS * (1 + SLACK)))
    with (
        # Entered first, so left last: windows that are being written when something fails still need it.
        ThreadPoolExecutor(
            max_workers=max(writing_threads, cores() - 1), initializer=_after_the_model
        ) as encoders,
        ThreadPoolExecutor(max_workers=writing_threads, initializer=_after_the_model) as pool,
        model.giving(hooks_for(model, [writer.source for writer in writers]), intake.take),
        progress("harvest", sum(len(kept) for *_, kept in work), "tokens") as bar,
    ):
        kept = _Counted(writers[0])
        writing: dict[int, Future[None]] = {}
        for turn, (split, number, window) in enumerate(work):
            here = [
                w for w in writers if (split, number) in missing[w] and w.source.layer not in intake.failed
            ]
            if not here:
                continue
            filled = [WindowRows.empty(len(window), writer.source, room.give_back) for writer in here]
            order = stored_order(here[0].source, split, number, len(window))
            batches = kept[split].batches(window, options.batch_size)
            targets = [(writer.source, rows) for writer, rows in zip(here, filled, strict=True)]
            fill_window(model, batches, order, intake, targets, room.take, bar.update)
            _wait(writing, intake.failed)
            if turn == 1:
                after_first()
            limits = options.max_quantisation_fvu, options.max_dimension_fvu
            for writer, rows in zip(here, filled, strict=True):
                if writer.source.layer in intake.failed:
                    rows.drop()
                    continue
                writing[writer.source.layer] = pool.submit(
                    _write, writer, split, number, rows, *limits, encoders.map
                )
        _wait(writing, intake.failed)
    return intake.failed


class Room:
    """Rows that may be in memory: whoever puts more waits until as many were given back."""

    def __init__(self, rows: int) -> None:
        self._left = rows
        self._changed = threading.Condition()

    def take(self, rows: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._left >= rows)
            self._left -= rows

    def give_back(self, rows: int) -> None:
        with self._changed:
            self._left += rows
            self._changed.notify_all()


def _write(writer: StoreWriter, split: str, number: int, rows: WindowRows, *options: Any) -> None:
    """Write one window; whatever happens, its memory is given back: the model waits for it."""
    try:
        writer.write_window(split, number, rows, *options)
    finally:
        rows.drop()


def _after_the_model() -> None:
    """Give this thread a tenth of the model's share of the processors; without it a harvest on two cores is 3 % slower.

    Only Linux has priorities of threads. Where the process has a lower one already (nice -n 19), or the kernel leaves
    no choice, the thread keeps what it has.
    """
    if sys.platform == "linux":
        thread = threading.get_native_id()
        lower = max(10, os.getpriority(os.PRIO_PROCESS, thread))  # raising it again takes root
        with contextlib.suppress(OSError):  # a container's seccomp
            os.setpriority(os.PRIO_PROCESS, thread, lower)


def _all_windows(writer: StoreWriter) -> Iterator[Window]:
    for split in SPLITS:
        for number, kept in enumerate(windows(writer.text.rows[split])):
            yield split, number, kept


def _wait(writing: dict[int, Future[None]], failed: dict[int, InputError]) -> None:
    """Until the windows are published; what ended the work on a layer goes to `failed`, anything else is raised."""
    for layer, future in writing.items():
        try:
            future.result()
        except InputError as error:
            failed.setdefault(layer, error)
    writing.clear()


class _Counted(dict[str, Kept]):
    """Each split's kept positions, counted when the split is first needed."""

    def __init__(self, writer: StoreWriter) -> None:
        self._writer = writer

    def __missing__(self, split: str) -> Kept:
        source = self._writer.source
        contexts = self._writer.contexts(split, source.context_length)
        self[split] = Kept.count(contexts, source.dropped_token_ids)
        return self[split]

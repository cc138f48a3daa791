"""Fill, compress and publish every missing window of every layer.

A window is compressed and written by background threads, its chunks side by side on all cores but one, while the
model fills the next one; at most one window per layer waits, so memory does not grow with the harvest.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from common.device import cores
from common.processes import Processes
from common.progress import progress
from common.settings import Harvest
from harvest.activations import Kept, fill_window
from harvest.lm import LanguageModel
from shards.layout import windows
from shards.manifest import SPLITS
from shards.writer import StoreWriter, WindowRows, stored_order

Window = tuple[str, int, range]
"""Split, number, kept positions."""


def run_windows(
    model: LanguageModel,
    writers: list[StoreWriter],
    options: Harvest,
    after_first: Callable[[], None],
    processes: Processes,
) -> None:
    """Write what the stores lack; this process's share of it where there are several.

    `after_first` is called once, when the first window's real size is on disk.
    Raises what the model or a writing thread raised; the stores stay resumable.
    """
    missing = {writer: frozenset(writer.missing()) for writer in writers}
    processes.wait()  # everyone has looked before anyone writes
    work = [window for window in _all_windows(writers[0]) if any(window[:2] in m for m in missing.values())]
    work = work[processes.rank :: processes.world]
    writing_threads = min(len(writers), 4)
    hooks = {hook for writer in writers for hook in (writer.source.input_hook, writer.source.output_hook)}
    with (
        # Entered first, so left last: windows that are being written when something fails still need it.
        ThreadPoolExecutor(
            max_workers=max(writing_threads, cores() - 1), initializer=_after_the_model
        ) as encoders,
        ThreadPoolExecutor(max_workers=writing_threads, initializer=_after_the_model) as pool,
        model.capturing(sorted(hooks)) as caught,
        progress("harvest", sum(len(kept) for *_, kept in work), "tokens") as bar,
    ):
        kept = _Counted(writers[0])
        writing: list[Future[None]] = []
        for turn, (split, number, window) in enumerate(work):
            here = [writer for writer in writers if (split, number) in missing[writer]]
            filled = [WindowRows.empty(len(window), writer.source) for writer in here]
            order = stored_order(here[0].source, split, number, len(window))
            batches = kept[split].batches(window, options.batch_size)
            targets = [(writer.source, rows) for writer, rows in zip(here, filled, strict=True)]
            fill_window(model, batches, order, caught, targets, bar.update)
            _wait(writing)
            if turn == 1:
                after_first()
            limits = options.max_quantisation_fvu, options.max_dimension_fvu
            writing = [
                pool.submit(writer.write_window, split, number, rows, *limits, encoders.map)
                for writer, rows in zip(here, filled, strict=True)
            ]
        _wait(writing)


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


def _wait(writing: list[Future[None]]) -> None:
    """Until the windows are published; raises what a writing thread raised."""
    for future in writing:
        future.result()


class _Counted(dict[str, Kept]):
    """Each split's kept positions, counted when the split is first needed."""

    def __init__(self, writer: StoreWriter) -> None:
        self._writer = writer

    def __missing__(self, split: str) -> Kept:
        source = self._writer.source
        contexts = self._writer.contexts(split, source.context_length)
        self[split] = Kept.count(contexts, source.dropped_token_ids)
        return self[split]

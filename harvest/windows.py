"""Fill, compress and publish every missing window of every layer.

A window is compressed and written by background threads, its chunks side by side on all cores but one, while the
model fills the next one. Each chunk's memory goes back when it is compressed, and rows of the next window wait for
that: both windows together take an eighth more than one, however long the harvest.

Where the model runs on a GPU, and rows are stored as int8, a window stays there until it is quantised there; its int8
and scales come to the host while the model runs over the next one, and the threads compress them. Layers whose windows
do not fit into half of the GPU's free memory are quantised by the threads.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from tqdm.auto import tqdm

from common.device import cores
from common.errors import InputError
from common.processes import Processes
from common.progress import progress, show_wait
from common.settings import Harvest
from harvest.activations import Intake, Kept, fill_window, hooks_for, refuse_unfinite
from harvest.lm import LanguageModel
from harvest.pace import WAITING, Pace
from shards.device.column import Landing, device_bytes
from shards.device.copies import Copies
from shards.layout import SHARD_ROWS, windows
from shards.manifest import SPLITS
from shards.plan import human
from shards.storage import STORAGES
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
    work = _share(writers[0], set().union(*missing.values()), processes)
    threads = min(len(writers), 4)
    intake, room, pace = Intake(), Room(int(2 * len(writers) * SHARD_ROWS * (1 + SLACK))), Pace()
    landings = on_the_device(model, writers)

    def make_room(rows: int) -> None:
        with pace.during(WAITING):
            room.take(rows)

    with (
        # Entered first, so left last: windows that are being written when something fails still need it.
        ThreadPoolExecutor(max(threads, cores() - 1), initializer=_after_the_model) as encoders,
        ThreadPoolExecutor(threads, initializer=_after_the_model) as pool,
        model.giving(hooks_for(model, [writer.source for writer in writers], landings), intake.take),
        progress("harvest", sum(len(kept) for *_, kept in work), "tokens") as bar,
    ):
        kept = _Counted(writers[0])
        writing = _Writing(pool, encoders, options, _Shown(pace, bar), intake.failed)
        for turn, (split, number, window) in enumerate(work):
            here = [
                w for w in writers if (split, number) in missing[w] and w.source.layer not in intake.failed
            ]
            if not here:
                continue
            filled = [
                WindowRows.empty(len(window), w.source, room.give_back, landings.get(w.source.layer))
                for w in here
            ]
            order = stored_order(here[0].source, split, number, len(window))
            batches = kept[split].batches(window, options.batch_size)
            targets = [(writer.source, rows) for writer, rows in zip(here, filled, strict=True)]
            fill_window(model, batches, order, intake, targets, make_room, bar.update)
            for source, rows in targets:
                if source.layer not in intake.failed:
                    rows.quantise(STORAGES[source.storage])
            writing.wait()
            if turn == 1:
                after_first()
            for writer, rows in zip(here, filled, strict=True):
                writing.begin(writer, split, number, rows)
        writing.end(writers)
        done = int(bar.n)
    if done and processes.leads and not intake.failed:
        tqdm.write(pace.line(done, processes.world), file=sys.stdout)
    return intake.failed


def on_the_device(model: LanguageModel, writers: list[StoreWriter]) -> dict[int, tuple[Landing, Landing]]:
    """Layers whose rows are quantised where the model runs, and where on the host inputs and outputs then come to.

    A note says so where not all of them fit there.
    """
    sources = [writer.source for writer in writers if STORAGES[writer.source.storage].scaled]
    if model.device.type == "cpu" or not sources:
        return {}
    room, copies = free(model.device) // 2, Copies(model.device)
    left, landings = room, {}
    for source in sources:
        # Inputs may be float32 in a model of 16 bits: a norm's output before its gain.
        need = device_bytes(source.d_in, 4) + device_bytes(source.d_out, model.dtype.itemsize)
        if need <= left:
            left -= need
            landings[source.layer] = Landing(copies), Landing(copies)
    if others := [source.layer for source in sources if source.layer not in landings]:
        tqdm.write(
            f"harvest: layer {' '.join(map(str, others))}: quantised on the CPU, as windows of {len(sources)} layers "
            f"do not fit into half of the GPU's free memory ({human(room)})",
            file=sys.stderr,
        )
    return landings


def free(device: torch.device) -> int:
    """Bytes of a device's memory that nobody holds."""
    return torch.cuda.mem_get_info(device)[0]


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


class _Writing:
    """The windows that are being written, one of each layer at most."""

    def __init__(
        self,
        pool: ThreadPoolExecutor,
        encoders: ThreadPoolExecutor,
        options: Harvest,
        pace: "_Shown",
        failed: dict[int, InputError],
    ) -> None:
        self._pool, self._encoders, self._pace, self._failed = pool, encoders, pace, failed
        self._limits = options.max_quantisation_fvu, options.max_dimension_fvu
        self._futures: dict[int, Future[None]] = {}

    def begin(self, writer: StoreWriter, split: str, number: int, rows: WindowRows) -> None:
        """Have a window written, unless its layer has failed."""
        if writer.source.layer in self._failed:
            rows.drop()
            return
        rows.fetch()
        self._futures[writer.source.layer] = self._pool.submit(self._write, writer, split, number, rows)

    def _write(self, writer: StoreWriter, split: str, number: int, rows: WindowRows) -> None:
        """Whatever happens, the rows' memory is given back: the model waits for it."""
        during = self._pace.during
        try:
            with during("model"):
                rows.wait_computed()
            with during("copy"):
                rows.wait_copied()
            refuse_unfinite(writer.source, rows)
            writer.write_window(split, number, rows, *self._limits, self._encoders.map, during)
        finally:
            rows.drop()

    def wait(self) -> None:
        """Until they are published; what ended the work on a layer goes to `failed`, anything else is raised."""
        for layer, future in self._futures.items():
            try:
                with self._pace.during(WAITING):
                    future.result()
            except InputError as error:
                self._failed.setdefault(layer, error)
        self._futures.clear()

    def end(self, writers: list[StoreWriter]) -> None:
        """Until all windows are published, and where they belong."""
        self.wait()
        for writer in writers:
            try:
                with self._pace.during(WAITING):
                    writer.settle(self._pace.during)
            except InputError as error:
                self._failed.setdefault(writer.source.layer, error)


class _Shown:
    """The pace; and while a store waits for uploads the bar says so."""

    def __init__(self, pace: Pace, bar: "tqdm[Any]") -> None:
        self._pace, self._bar = pace, bar

    @contextlib.contextmanager
    def during(self, what: str) -> Iterator[None]:
        with self._pace.during(what):
            if what != "upload":
                yield
                return
            show_wait(self._bar, "waiting for uploads")
            try:
                yield
            finally:
                self._bar.set_postfix_str("", refresh=False)


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


def _share(writer: StoreWriter, missing: set[tuple[str, int]], processes: Processes) -> list[Window]:
    """This process's windows of those that any store lacks."""
    work = [window for window in _all_windows(writer) if window[:2] in missing]
    return work[processes.rank :: processes.world]


def _all_windows(writer: StoreWriter) -> Iterator[Window]:
    for split in SPLITS:
        for number, kept in enumerate(windows(writer.text.rows[split])):
            yield split, number, kept


class _Counted(dict[str, Kept]):
    """Each split's kept positions, counted when the split is first needed."""

    def __init__(self, writer: StoreWriter) -> None:
        self._writer = writer

    def __missing__(self, split: str) -> Kept:
        source = self._writer.source
        contexts = self._writer.contexts(split, source.context_length)
        self[split] = Kept.count(contexts, source.dropped_token_ids)
        return self[split]

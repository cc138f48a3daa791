"""Reader + order -> shuffled, dequantised batches on the training device, decoded ahead, from any position.

The full chunks of an epoch are permuted and cut into groups of M. A batch takes B/M consecutive rows of each chunk
of its group, so it mixes the text of M windows, and every file is still read chunk by chunk. Threads decode the next
group (numcodecs releases the GIL) into one of two buffers that are reused. A group keeps the storage type until
another thread cuts a batch from it.

On a GPU a group is decoded into pinned memory, copied there whole while batches are cut from the one before, and cut
and dequantised there by the caller's thread: three kernels a side, and no thread of Python's beside the decoders.

Shapes: B batch, M chunks of a group, R rows per chunk of a batch (B = M * R), D width.
"""

import functools
import math
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from common.device import cores
from common.errors import InputError
from shards.device.copies import Copies
from shards.layout import CHUNK_ROWS
from shards.objects.ahead import Turn, fetching
from shards.objects.pieces import in_pieces
from shards.order import chunk_groups
from shards.reader import ChunkReader
from shards.storage import Storage

GROUP_CHUNKS = 32
"""32 chunks give a batch 95 % of the distinct contexts of independent draws, 16 give 90 % (simulated, 400k rows)."""
AHEAD = 2
"""Batches cut ahead of the caller: 38 MB of float32 at width 2,304."""
SIDES = ("input", "output")


class StoredRows(Protocol):
    """The part of a `shards.StoreSplit` that a loader needs."""

    d_in: int
    d_out: int
    storage: Storage
    readers: dict[str, ChunkReader]
    """Readers by array name."""

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Batch:
    """One training batch and its place."""

    inputs: torch.Tensor
    """[B, D_in] float32"""
    outputs: torch.Tensor
    """[B, D_out] float32"""
    rows: np.ndarray
    """[B] int64: number of each row in the stored split"""
    epoch: int
    index: int
    """Number of the batch in its epoch."""


class Loader:
    """Iterator of (inputs, outputs); `batches()` gives rows and position too.

    The order is a pure function of (seed, epoch, number of chunks). A start at any (epoch, batch) gives the
    batches that an uninterrupted pass gives there. `batch_size` counts the rows of all ranks. Rank r of n reads
    chunks r::n of each group, so the batches of all ranks together are the batch of one process.
    Raises `InputError` if the split is too small for a batch, and any error of a decoding thread.
    """

    def __init__(
        self,
        split: StoredRows,
        batch_size: int,
        seed: int,
        epoch: int,
        batch: int,
        epochs: int | None,
        device: torch.device,
        rank: int,
        world: int,
    ) -> None:
        self.chunks = len(split) // CHUNK_ROWS
        if self.chunks == 0:
            raise InputError(
                f"the split has {len(split)} rows; a loader needs at least one chunk of {CHUNK_ROWS}"
            )
        self.group = group_size(self.chunks, batch_size, world)
        self.rows_per_chunk = batch_size // self.group
        self.split, self.seed, self.device = split, seed, device
        self.rank, self.world = rank, world
        self.start_epoch, self.start_batch = epoch, batch
        self.stop_epoch = math.inf if epochs is None else epoch + epochs
        self._bounded = epochs is not None

    @property
    def batches_per_group(self) -> int:
        """Batches that are cut from one group of chunks."""
        return CHUNK_ROWS // self.rows_per_chunk

    @property
    def batches_per_epoch(self) -> int:
        """Batches of one pass, without the rows of the last, incomplete group."""
        return self.chunks // self.group * self.batches_per_group

    def __len__(self) -> int:
        """Number of remaining batches; an endless loader has no length."""
        if not self._bounded:
            raise TypeError("an endless loader has no length")
        return int(self.stop_epoch - self.start_epoch) * self.batches_per_epoch - self.start_batch

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch in self.batches():
            yield batch.inputs, batch.outputs

    @functools.cached_property
    def _readers(self) -> dict[str, ChunkReader]:
        """Of the arrays that a batch is made of. Remote chunks are fetched one by one, ahead of the decoders."""
        kinds = ("s", "_scales", "_row_scales", "_offsets")
        names = [f"{side}{kind}" for side in SIDES for kind in kinds]
        return {name: in_pieces(self.split.readers[name]) for name in names if name in self.split.readers}

    def batches(self) -> Generator[Batch, None, None]:
        """Yields batches. Threads decode the next group."""
        return self._on_cpu() if self.device.type == "cpu" else self._on_device()

    def _on_device(self) -> Generator[Batch, None, None]:
        copies = Copies(self.device)
        current, following = DeviceGroup(self, copies), DeviceGroup(self, copies)
        with (
            ThreadPoolExecutor(min(4, cores())) as decoders,
            fetching(self._readers) as fetched,
        ):
            turns = fetched(self._schedule())
            try:
                turn = next(turns, None)
                if turn is not None:
                    current.decode(decoders, turn)
                while turn is not None:
                    next_turn = next(turns, None)
                    if next_turn is not None:
                        following.decode(decoders, next_turn)
                    current.arrive()
                    for within in range(turn.first_batch, self.batches_per_group):
                        yield self._cut(current, turn, within)
                        following.send_if_decoded()
                    current.leave()
                    current, following, turn = following, current, next_turn
            finally:
                current.settle()
                following.settle()

    def _on_cpu(self) -> Generator[Batch, None, None]:
        """Other threads cut AHEAD batches from the current group."""
        current, following = _Group(self), _Group(self)
        cut: deque[Future[Batch]] = deque()
        with (
            ThreadPoolExecutor(min(4, cores())) as decoders,
            ThreadPoolExecutor(min(AHEAD, cores())) as cutters,
            fetching(self._readers) as fetched,
        ):
            turns = fetched(self._schedule())
            turn = next(turns, None)
            if turn is not None:
                current.decode(decoders, turn)
            while turn is not None:
                next_turn = next(turns, None)
                wait(cut)  # these batches read the buffers that `following` will overwrite
                if next_turn is not None:
                    following.decode(decoders, next_turn)
                current.wait()
                for within in range(turn.first_batch, self.batches_per_group):
                    cut.append(cutters.submit(self._cut, current, turn, within))
                    if len(cut) > AHEAD:
                        yield cut.popleft().result()
                current, following, turn = following, current, next_turn
            while cut:
                yield cut.popleft().result()

    def _schedule(self) -> Iterator["Turn"]:
        epoch, batch = self.start_epoch, self.start_batch
        while epoch < self.stop_epoch:
            groups = chunk_groups(self.chunks, self.group, self.seed, epoch)
            for number in range(batch // self.batches_per_group, len(groups)):
                first = max(batch - number * self.batches_per_group, 0)
                yield Turn(epoch, number, first, groups[number][self.rank :: self.world])
            epoch, batch = epoch + 1, 0

    def _cut(self, group: "_Group | DeviceGroup", turn: Turn, within: int) -> Batch:
        rows = slice(within * self.rows_per_chunk, (within + 1) * self.rows_per_chunk)
        numbers = turn.chunks[:, None] * CHUNK_ROWS + np.arange(rows.start, rows.stop)
        return Batch(
            group.values("input", rows),
            group.values("output", rows),
            numbers.reshape(-1),
            turn.epoch,
            turn.group * self.batches_per_group + within,
        )


class _Group:
    """Buffers of one group of M chunks, in the storage type."""

    def __init__(self, loader: Loader) -> None:
        m = loader.group // loader.world
        self._split, self._readers = loader.split, loader._readers
        self._pending: list[Future[None]] = []
        self._arrays = {n: np.empty((m, *r.array.chunk), r.array.dtype) for n, r in self._readers.items()}

    def decode(self, pool: ThreadPoolExecutor, turn: Turn) -> None:
        assert not self._pending
        self._pending = [pool.submit(self._decode_one, turn, slot) for slot in range(len(turn.chunks))]

    def _decode_one(self, turn: Turn, slot: int) -> None:
        turn.wait(slot)
        for name, buffer in self._arrays.items():
            self._readers[name].chunk(int(turn.chunks[slot]), out=buffer[slot])

    def wait(self) -> None:
        """Wait until every chunk is decoded. Raises the error of a thread that failed."""
        pending, self._pending = self._pending, []
        for future in pending:
            future.result()

    def values(self, side: str, rows: slice) -> torch.Tensor:
        """[M * R, D] float32, computed in numpy: it takes one core in this thread. Torch would take all cores and spin
        (430 k rows/s on two cores, see docs/log.md).
        """
        values = self._split.storage.widen(self._arrays[f"{side}s"][:, rows])
        if f"{side}_scales" in self._arrays:  # of columns [M, 1, D]
            values *= self._arrays[f"{side}_scales"]
            values *= self._arrays[f"{side}_row_scales"][:, rows, None]
        if f"{side}_offsets" in self._arrays:
            values += self._arrays[f"{side}_offsets"]
        return torch.from_numpy(values.reshape(-1, values.shape[-1]))


class DeviceGroup(_Group):
    """The same group in pinned memory of the host, and on the device. Its methods are called by one thread."""

    def __init__(self, loader: Loader, copies: Copies) -> None:
        super().__init__(loader)
        self._copies = copies
        self._pinned = {n: copies.pinned(a.shape, _torch_type(a.dtype)) for n, a in self._arrays.items()}
        self._there = {
            n: torch.empty(t.shape, dtype=t.dtype, device=copies.device) for n, t in self._pinned.items()
        }
        self._arrays = {n: tensor.numpy().view(self._arrays[n].dtype) for n, tensor in self._pinned.items()}
        self._cut = self._copied = copies.mark()

    def decode(self, pool: ThreadPoolExecutor, turn: Turn) -> None:
        """Into pinned memory, once it was copied: long ago, as batches were cut from the copy since."""
        self._copied.wait()
        super().decode(pool, turn)

    def send_if_decoded(self) -> None:
        """Begin the copy, where every chunk is there and it was not begun."""
        if self._pending and all(future.done() and not future.exception() for future in self._pending):
            self._send()

    def _send(self) -> None:
        self.wait()
        pairs = [(there, self._pinned[name]) for name, there in self._there.items()]
        self._copied = self._copies.start(pairs, after=self._cut)

    def arrive(self) -> None:
        """What is cut from here on has the group: as a rule it is on the device by now."""
        if self._pending:
            self._send()
        self._copies.compute_after(self._copied)

    def leave(self) -> None:
        """No more batches are cut: the device may overwrite the group once it has cut those that were asked for."""
        self._cut = self._copies.mark()

    def settle(self) -> None:
        """Until no copy is under way: its memory may then be given back."""
        self._copied.wait()

    def values(self, side: str, rows: slice) -> torch.Tensor:
        """[M * R, D] float32, the same as on the CPU, in memory of its own."""
        stored = self._there[f"{side}s"][:, rows]
        if bits := self._split.storage.torch_bits:
            stored = stored.view(getattr(torch, bits))
        if f"{side}_scales" not in self._there:
            values = torch.empty(stored.shape, dtype=torch.float32, device=stored.device)
            return values.copy_(stored).flatten(0, 1)
        values = stored * self._there[f"{side}_scales"]  # int8 * float32 is float32
        values *= self._there[f"{side}_row_scales"][:, rows, None]
        if f"{side}_offsets" in self._there:
            values += self._there[f"{side}_offsets"]
        return values.flatten(0, 1)


def _torch_type(dtype: np.dtype) -> torch.dtype:
    """Of the same size: the bits of bfloat16 come as int16."""
    return torch.from_numpy(np.empty(0, np.int16 if dtype == np.uint16 else dtype)).dtype


def chunks_of_batch(batch_size: int, chunks: int = GROUP_CHUNKS) -> int | None:
    """M: the largest number up to 32 that a split of so many `chunks` can fill and that divides the batch; None if the
    batch takes too many rows of each.

    >>> chunks_of_batch(1536), chunks_of_batch(1530), chunks_of_batch(1536, chunks=7), chunks_of_batch(65_536)
    (32, 30, 6, None)
    """
    for size in range(min(GROUP_CHUNKS, chunks), 0, -1):
        if batch_size % size == 0 and batch_size // size <= CHUNK_ROWS:
            return size
    return None


def shares_rows(world: int, batch_size: int, chunks: int = GROUP_CHUNKS) -> bool:
    """Whether so many processes can share the chunks that one process would take a batch of.

    >>> [world for world in range(1, 65) if shares_rows(world, 1536)]
    [1, 2, 4, 8, 16, 32]
    """
    found = chunks_of_batch(batch_size, chunks)
    return found is not None and found % world == 0


def group_size(chunks: int, batch_size: int, world: int) -> int:
    """`chunks_of_batch`, whatever the number of ranks: of other groups they would get other batches.

    Raises `InputError` where there is none, or where so many ranks cannot share it; it names a batch that they can.
    """
    size = chunks_of_batch(batch_size, chunks)
    if size is not None and size % world == 0:
        return size
    available = min(GROUP_CHUNKS, chunks)
    if world > available:
        raise InputError(
            f"{world} processes cannot share {available} chunks of {CHUNK_ROWS} rows; start fewer"
        )
    most = min(batch_size, available * CHUNK_ROWS) // world * world
    fits = (size for size in range(most, 0, -world) if shares_rows(world, size, chunks))
    raise InputError(
        f"train.batch_size {batch_size}: a batch takes equally many rows, at most {CHUNK_ROWS:,}, of each of up to "
        f"{available} chunks, which {world} process(es) share; use {next(fits, world)}"
    )

"""The processes of one run, which work together: started by torchrun, or by a launcher that sets the same variables."""

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from common import launched
from common.errors import InputError, first_line
from common.nodes.environment import rank, world
from common.nodes.watch import GRACE, left_to_others, watched

CPU = torch.device("cpu")
LOST = re.compile(r"gloo|NCCL|[Cc]onnection (closed|reset)|Broken pipe")
"""In the text of a RuntimeError: it comes from an exchange between processes."""
COME = 600
"""Seconds in which all processes must come: pods and tasks start independently, and one node's disk may be slow."""
SEEN = 45
"""Seconds after which every node sees a new file: on NFS a new name may take 30 s to appear."""


def meet(device: torch.device) -> dist.Store | None:  # pyright: ignore[reportPrivateImportUsage]
    """Meet the other processes, if there are any: gloo on CPU, nccl on CUDA, bound to this process's device.

    Returns the store where they have met; None if this process is alone or they had met before. Raises `InputError` if
    they do not come.
    """
    if world() == 1 or dist.is_initialized():
        return None
    rank()
    backend, own = "gloo", None
    if device.type == "cuda":
        backend, own = "nccl", torch.device("cuda", device.index or 0)
        torch.cuda.set_device(own)
    try:
        with waiting():
            store = _all_here()
            dist.init_process_group(backend, device_id=own, store=store, rank=rank(), world_size=world())
    except InputError:
        raise
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise InputError(
            f"environment: the {world()} processes of WORLD_SIZE did not meet at {where} ({first_line(error):.200}); "
            "start them all with torchrun (NPROC=n), or unset WORLD_SIZE"
        ) from error
    return store


def _all_here() -> dist.Store:  # pyright: ignore[reportPrivateImportUsage]
    """The store where the processes meet, once all are there. Raises `InputError` that names the missing ranks.

    torch.distributed itself would wait for a process that has ended with an error as long as for a sum: half an hour.
    """
    limit = timedelta(seconds=COME)
    store, own, size = next(dist.rendezvous("env://", timeout=limit))  # pyright: ignore[reportPrivateImportUsage]
    store.set(f"here/{own}", "")
    try:
        store.wait([f"here/{each}" for each in range(size)], limit)
    except dist.DistStoreError:
        absent = [each for each in range(size) if not store.check([f"here/{each}"])]
        raise InputError(
            f"of {size} ranks these did not arrive within {COME} s: {' '.join(map(str, absent))}; their output or "
            "their nodes' tells why, and the same command continues"
        ) from None
    return store


@contextmanager
def ended_together() -> Iterator[None]:
    """When one of several processes ends, end this one too, with a line instead of the lost connection's exception."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or LOST.search(str(error))):
            raise
        # First those that know more may end this process: torchrun, which stops a node's processes when it has seen
        # one end, and the watcher (common/nodes/watch.py), which knows the rank that is lost.
        time.sleep(2 * GRACE)
        # gloo's message begins with a place in its source and ends with advice.
        why, _, _ = re.sub(r"^\[/\S*\] ", "", first_line(error)).partition(". ")
        end_with_another(f" ({why:.200})", error)


def end_with_another(why: str = "", error: Exception | None = None) -> NoReturn:
    """End this process because another one has ended, whose output tells why; one process of a node prints the line."""
    line = (
        f"another of the {world()} processes has ended{why}; its output or its node's tells why, and the same command "
        "continues"
    )
    if left_to_others(line):
        raise SystemExit(2) from None
    raise InputError(line) from error


@contextmanager
def waiting() -> Iterator[None]:
    """While this lasts, SIGTERM and Ctrl-C end the process at once.

    PyTorch waits for other processes in C++, half an hour for one that never comes, and Python's own handlers run
    only after that. To end at once is safe: the kernel frees the locks, and what is on disk is whole at any instant.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    before = signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_end_at_a_signal, args=(reads,), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writes)  # the watcher reads an end of file
        watcher.join()
        os.close(reads)


def _end_at_a_signal(reads: int) -> None:
    ends = {signal.SIGINT, signal.SIGTERM}
    while numbers := os.read(reads, 64):
        if ends.intersection(numbers):
            if not launched():
                print("interrupted: the same command continues", file=sys.stderr, flush=True)
            os._exit(130)


@dataclass(frozen=True)
class Processes:
    """Process `rank` of `world`.

    All processes call every method, in the same order. For a single process the methods cost nothing.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = CPU
    """The device of the tensors that the processes exchange."""
    group: dist.ProcessGroup | None = None
    """These processes for torch.distributed; None: all processes of the run."""

    @property
    def leads(self) -> bool:
        """Whether this is the one process that writes files and prints."""
        return self.rank == 0

    def total(self, tensor: Tensor) -> Tensor:
        """Sum over the processes, in place; the same bits on each."""
        if self.world > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def total_later(self, tensor: Tensor) -> Callable[[], object]:
        """Begin `total` of a tensor; it is complete once the returned function has been called."""
        work = dist.all_reduce(tensor, group=self.group, async_op=True)
        assert work is not None
        return work.wait

    def gathered(self, values: Tensor) -> Tensor:
        """The one-dimensional values of all processes, of any lengths, in order of rank."""
        if self.world == 1:
            return values
        lengths = self._everyone(torch.tensor([len(values)], device=values.device))
        longest = max(int(length) for length in lengths)
        padded = values.new_zeros(longest)
        padded[: len(values)] = values
        parts = self._everyone(padded)
        return torch.cat([part[: int(length)] for part, length in zip(parts, lengths, strict=True)])

    def stacked(self, tensor: Tensor) -> Tensor:
        """[world, ...] the tensors of all processes, all of one shape, in order of rank."""
        return tensor[None] if self.world == 1 else torch.stack(self._everyone(tensor))

    def largest(self, tensor: Tensor) -> Tensor:
        """The largest value of each element over the processes, in place."""
        return tensor if self.world == 1 else tensor.copy_(self.stacked(tensor).amax(0))

    def _everyone(self, tensor: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(parts, tensor, group=self.group)
        return parts

    def count(self, number: int) -> int:
        """The sum of `number` over the processes. On a GPU the host waits here."""
        if self.world == 1:
            return number
        return int(self.total(torch.tensor(number, device=self.device)))  # sync: all must decide the same

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set in any process."""
        if self.world == 1:
            return flag
        return bool(self.total(torch.tensor(float(flag), device=self.device)))

    def add(self, *arrays: np.ndarray) -> None:
        """Sum arrays on the host over the processes, in place; not for arrays of bool."""
        for array in arrays if self.world > 1 else ():
            summed = self.total(torch.from_numpy(np.ascontiguousarray(array)).to(self.device))
            array[...] = summed.cpu().numpy()

    def chained(self, array: np.ndarray) -> np.ndarray:
        """All processes' arrays on the host [n, ...], in order of rank. Only n may differ. Sent as bytes: any dtype."""
        if self.world == 1:
            return array
        own = torch.from_numpy(np.frombuffer(array.tobytes(), np.uint8).copy()).to(self.device)
        return self.gathered(own).cpu().numpy().view(array.dtype).reshape(-1, *array.shape[1:])

    def said(self, line: str) -> list[str]:
        """The lines of all processes, in order of rank; waits until every process has given its own."""
        self.wait()
        return self.chained(np.frombuffer(f"{line}\n".encode(), np.uint8)).tobytes().decode().split("\n")[:-1]

    def wait(self) -> None:
        """Wait until every process is here. A barrier of nccl would choose a device itself."""
        if self.world > 1:
            with waiting():
                self.any(False)

    def together(self, part: Callable[[], None]) -> None:
        """Have each process do its part, and wait until all have finished.

        If the disk refuses one of them, all end: that process raises its `OSError`, the others say that another has
        ended. Until then nothing is removed, so none removes a file that another is still writing.
        """
        refused: OSError | None = None
        try:
            part()
        except OSError as error:
            refused = error
        with waiting() if self.world > 1 else nullcontext():
            stopped = self.any(refused is not None)
        if refused is not None:
            raise refused
        if stopped:
            end_with_another()

    def see(self, path: Path) -> None:
        """Wait until this process sees the file that rank 0 has written; call it when rank 0 has written it.

        Raises `InputError` if this node does not share rank 0's disk.
        """
        until = time.monotonic() + SEEN
        while not (self.leads or path.exists()):
            if time.monotonic() > until:
                raise InputError(
                    f"{path}: rank 0 has written it, but it did not appear here within {SEEN} s; all nodes need the "
                    "same disk at this path (docs/nodes.md)"
                )
            time.sleep(0.2)


ALONE = Processes()


@contextmanager
def joined(device: torch.device = CPU) -> Iterator[Processes]:
    """The processes of this run, or this one alone."""
    if world() == 1:
        yield ALONE
        return
    store = meet(device)
    everyone = Processes(dist.get_rank(), world(), device)
    try:
        with watched(store), ended_together():
            # torchrun counts restarts on each node: those after a process of that node has ended
            if everyone.any(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0") and everyone.leads:
                line = (
                    "note: all processes were restarted after one had ended; continuing from what is on disk"
                )
                print(line, file=sys.stderr, flush=True)
            yield everyone
    finally:
        dist.destroy_process_group()

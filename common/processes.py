"""The processes of one run, which work together: started by torchrun, or by what sets the same variables."""

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
"""In the words of a RuntimeError: that it is of an exchange between processes."""
COME = 600
"""Seconds in which all processes come: pods and tasks each start on their own, one node's disk may be slow."""
SEEN = 45
"""Seconds after which every node sees a new file: a shared disk's names may be known anew after 30 only (NFS)."""


def meet(device: torch.device) -> dist.Store | None:  # pyright: ignore[reportPrivateImportUsage]
    """Meet the other processes, if there are any: gloo on CPU, nccl on CUDA, bound to this process's device.

    Returns where they have met; none where this one is alone or they had met before. Raises `InputError` when they do
    not come.
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
    """Where the processes meet, when every one is there; raises `InputError` that says which ones are not.

    torch.distributed itself would wait half an hour, as long as for a sum, for one that has ended with an error.
    """
    limit = timedelta(seconds=COME)
    store, own, size = next(dist.rendezvous("env://", timeout=limit))  # pyright: ignore[reportPrivateImportUsage]
    store.set(f"here/{own}", "")
    try:
        store.wait([f"here/{each}" for each in range(size)], limit)
    except dist.DistStoreError:
        absent = [each for each in range(size) if not store.check([f"here/{each}"])]
        raise InputError(
            f"rank {' '.join(map(str, absent))} of {size} did not come in {COME} s; what they or their nodes say tells "
            "why, and the same command continues"
        ) from None
    return store


@contextmanager
def ended_together() -> Iterator[None]:
    """One process of several that ends ends the others: a line in place of what the lost connection raises."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or LOST.search(str(error))):
            raise
        # Whoever knows more has its turn: torchrun, which stops a node's processes when it has seen one end, and
        # the connection that tells which rank is lost.
        time.sleep(2 * GRACE)
        # gloo's begins with a place in its source, and ends with advice.
        why, _, _ = re.sub(r"^\[/\S*\] ", "", first_line(error)).partition(". ")
        end_with_another(f" ({why:.200})", error)


def end_with_another(why: str = "", error: Exception | None = None) -> NoReturn:
    """End this process because of another one, which says more; the line comes once from a node."""
    line = f"another of the {world()} processes has ended, as it or its node says{why}; the same command continues"
    if left_to_others(line):
        raise SystemExit(2) from None
    raise InputError(line) from error


@contextmanager
def waiting() -> Iterator[None]:
    """While this lasts, SIGTERM and Ctrl-C end the process at once.

    PyTorch waits for other processes in C++, half an hour for one that never comes, and Python's own handlers run
    only when it comes back. The kernel frees the locks, and what is on disk is whole at any instant.
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
        os.close(writes)  # the watcher reads the end
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

    Every method is called by all of them, in the same order. Alone, they cost nothing.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = CPU
    """Where the tensors are that they exchange."""
    group: dist.ProcessGroup | None = None
    """torch.distributed's name of them; None: all processes of the run."""

    @property
    def leads(self) -> bool:
        """The one process that writes files and talks."""
        return self.rank == 0

    def total(self, tensor: Tensor) -> Tensor:
        """Sum over the processes, in place; the same bits on each."""
        if self.world > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def total_later(self, tensor: Tensor) -> Callable[[], object]:
        """Begin `total` of a tensor; it is done when the function that is returned has been called."""
        work = dist.all_reduce(tensor, group=self.group, async_op=True)
        assert work is not None
        return work.wait

    def gathered(self, values: Tensor) -> Tensor:
        """All processes' one-dimensional values, of any lengths, in order of rank."""
        if self.world == 1:
            return values
        lengths = self._everyone(torch.tensor([len(values)], device=values.device))
        longest = max(int(length) for length in lengths)
        padded = values.new_zeros(longest)
        padded[: len(values)] = values
        parts = self._everyone(padded)
        return torch.cat([part[: int(length)] for part, length in zip(parts, lengths, strict=True)])

    def stacked(self, tensor: Tensor) -> Tensor:
        """[world, ...] all processes' tensors, of one shape, in order of rank."""
        return tensor[None] if self.world == 1 else torch.stack(self._everyone(tensor))

    def largest(self, tensor: Tensor) -> Tensor:
        """Largest over the processes of each element, in place."""
        return tensor if self.world == 1 else tensor.copy_(self.stacked(tensor).amax(0))

    def _everyone(self, tensor: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(parts, tensor, group=self.group)
        return parts

    def count(self, number: int) -> int:
        """The sum of all processes' numbers. On a GPU the host waits here."""
        if self.world == 1:
            return number
        return int(self.total(torch.tensor(number, device=self.device)))  # sync: all must decide the same

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        if self.world == 1:
            return flag
        return bool(self.total(torch.tensor(float(flag), device=self.device)))

    def add(self, *arrays: np.ndarray) -> None:
        """Sum of arrays on the host over the processes, in place; none may be of bool."""
        for array in arrays if self.world > 1 else ():
            summed = self.total(torch.from_numpy(np.ascontiguousarray(array)).to(self.device))
            array[...] = summed.cpu().numpy()

    def chained(self, array: np.ndarray) -> np.ndarray:
        """All processes' arrays on the host [n, ...], in order of rank; only n may differ. Their bytes: any dtype."""
        if self.world == 1:
            return array
        own = torch.from_numpy(np.frombuffer(array.tobytes(), np.uint8).copy()).to(self.device)
        return self.gathered(own).cpu().numpy().view(array.dtype).reshape(-1, *array.shape[1:])

    def said(self, line: str) -> list[str]:
        """The line that each process says, in order of rank, when the last has said its own."""
        self.wait()
        return self.chained(np.frombuffer(f"{line}\n".encode(), np.uint8)).tobytes().decode().split("\n")[:-1]

    def wait(self) -> None:
        """Until every process is here. A barrier of nccl would choose a device itself."""
        if self.world > 1:
            with waiting():
                self.any(False)

    def together(self, part: Callable[[], None]) -> None:
        """Have each process do its part, and wait until all are through.

        Where the disk refuses one, all end: that process raises its `OSError`, the others leave the word to it. So
        none removes what others are still writing.
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
        """Until this process sees what the first has written, called when it is there.

        Raises `InputError` where the node does not share its disk.
        """
        until = time.monotonic() + SEEN
        while not (self.leads or path.exists()):
            if time.monotonic() > until:
                raise InputError(
                    f"{path}: written by rank 0, and not seen here in {SEEN} s; all nodes need the same disk at this "
                    "path (docs/nodes.md)"
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
    if rank() == 0 and (again := os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) != "0":
        line = f"note: restart {again} after a process has ended; what is on disk goes on"
        print(line, file=sys.stderr, flush=True)
    try:
        with watched(store), ended_together():
            yield Processes(dist.get_rank(), world(), device)
    finally:
        dist.destroy_process_group()

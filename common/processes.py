"""The processes of one run, which work together: started by torchrun, or by what sets the same variables."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import InputError, first_line

CPU = torch.device("cpu")
MEETING = ("RANK", "MASTER_ADDR", "MASTER_PORT")


def rank() -> int:
    """This process's number, from 0."""
    return _number("RANK", 0, range(world())) if world() > 1 else 0


def world() -> int:
    """How many processes there are; 1 without torchrun.

    Raises `InputError` where WORLD_SIZE is left over from something else: the others would never come.
    """
    size = _number("WORLD_SIZE", 1, range(1, 2**20))
    if size > 1 and (missing := [name for name in MEETING if not os.environ.get(name)]):
        raise InputError(
            f"environment: WORLD_SIZE={size}, but no {' and '.join(missing)}: torchrun, which sets them all, has not "
            f"started this process; unset WORLD_SIZE for one process, or give NPROC={size} (make)"
        )
    return size


def _number(name: str, default: int, allowed: range) -> int:
    text = os.environ.get(name) or str(default)
    if not (text.isdecimal() and int(text) in allowed):
        raise InputError(
            f"environment: {name}: expected a whole number from {allowed.start} to {allowed.stop - 1}, found {text!r}; "
            "torchrun sets it, unset it without"
        )
    return int(text)


def meet(device: torch.device) -> None:
    """Meet the other processes, if there are any: gloo on CPU, nccl on CUDA, bound to this process's device.

    Raises `InputError` when they do not come.
    """
    if world() == 1 or dist.is_initialized():
        return
    rank()
    backend, own = "gloo", None
    if device.type == "cuda":
        backend, own = "nccl", torch.device("cuda", device.index or 0)
        torch.cuda.set_device(own)
    try:
        with waiting():
            dist.init_process_group(backend, device_id=own)
    except (dist.DistError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise InputError(
            f"environment: the {world()} processes of WORLD_SIZE did not meet at {where} ({first_line(error):.200}); "
            "start them all with torchrun (NPROC=n), or unset WORLD_SIZE"
        ) from error


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

    def wait(self) -> None:
        """Until every process is here. A barrier of nccl would choose a device itself."""
        if self.world > 1:
            with waiting():
                self.any(False)


ALONE = Processes()


@contextmanager
def joined(device: torch.device = CPU) -> Iterator[Processes]:
    """The processes of this run, or this one alone."""
    if world() == 1:
        yield ALONE
        return
    meet(device)
    try:
        yield Processes(dist.get_rank(), world(), device)
    finally:
        dist.destroy_process_group()

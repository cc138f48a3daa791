"""Several processes that work together, started by torchrun or by what sets the same variables: who am I, and where
are the others.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from common.errors import InputError, first_line

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


def meet(backend: str) -> None:
    """Meet the other processes, if there are any; raises `InputError` when they do not come."""
    if world() == 1 or dist.is_initialized():
        return
    rank()
    try:
        with waiting():
            dist.init_process_group(backend)
    except (dist.DistError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise InputError(
            f"environment: the {world()} processes of WORLD_SIZE did not meet at {where} ({first_line(error):.200}); "
            "start them all with torchrun (NPROC=n), or unset WORLD_SIZE"
        ) from error


def wait() -> None:
    """Until every process is here."""
    if world() > 1:
        with waiting():
            dist.barrier()


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

"""python -m common.launch 4 train --layer 17: a stage in several processes, which end as one would.

torchrun itself shows a traceback of its own, and exit code 1, for whatever ends a process; here the processes have
said why they stopped, and the exit code is that of the first that did.

On several nodes (--nodes 4 --head host:port, before the processes) each runs this command; torchrun's c10d rendezvous
on the head's port brings them together (common/nodes/meeting.py). --max-restarts 3 starts all processes again, up to
three times, when one has ended: they continue from the last checkpoint.

Stages that work on one layer at a time take several here too: one after another in all processes, or, with
--spread layers, each in a process of its own (common/layers/).
"""

import importlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from functools import partial

# Of PyTorch's C++, also in the processes: a page of addresses for every connection that is refused or lost.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch.distributed as dist
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousError

from common.cli import run_stage
from common.errors import InputError
from common.layers import driver
from common.nodes.meeting import Nodes

ONE_LAYER = ("train", "train.sweep", "evaluate", "evaluate.compare")
"""Stages that work on one layer at a time, by common/layers/driver.py."""
OPTIONS = ("--nodes", "--head", "--max-restarts")
SILENT = "<N/A>"
"""torchrun's word for the note of a process that has left none."""
PATIENCE = 25
"""Seconds: torchrun kills those that do not end after 30."""
INTERRUPTED = 130


def main() -> None:
    words, given = sys.argv[1:], dict[str, str]()
    while words and (option := words[0].partition("="))[0] in OPTIONS:
        name, equals, value = option
        given[name] = value if equals or len(words) < 2 else words.pop(1)
        words.pop(0)
    if len(words) < 2:
        raise InputError(
            "launch: expected processes and a stage, for example: python -m common.launch 4 train --layer 17"
        )
    processes, stage, *arguments = words
    if not (processes.isdecimal() and int(processes)):
        raise InputError(f"NPROC: expected a number of processes from 1, found {processes!r}")
    restarts = given.get("--max-restarts")
    if restarts is not None and not restarts.isdecimal():
        raise InputError(
            f"RESTARTS: expected how often all processes may start again, from 0, found {restarts!r}"
        )
    again = ["--max-restarts", restarts] if restarts else []
    nodes = Nodes.of(given.get("--nodes"), given.get("--head"))
    # "--" because torchrun would take --run for an option of its own.
    command = [*again, "--nproc-per-node", processes, "-m", "--", stage, *arguments]
    together = partial(_torchrun, command, nodes)
    if stage not in ONE_LAYER:
        together()
        return
    driver.launch = driver.Launch(int(processes), stage, together, tuple(again), one_node=nodes is None)
    sys.argv = [stage, *arguments]
    importlib.import_module(stage if "." in stage else f"{stage}.__main__").main()


def _torchrun(command: Sequence[str], nodes: Nodes | None) -> None:
    logging.disable()  # of the launcher: who was sent which signal when one had stopped
    # A store of their own for every start of the processes: the launchers' one keeps the addresses of those before a
    # restart, and the next ones wait for them.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    where = nodes.options(command) if nodes else ["--standalone"]
    try:
        run.main([*where, *command])
    except SignalException:  # it has passed the signal on, and waited
        raise KeyboardInterrupt from None
    except ChildFailedError as error:
        raise SystemExit(_why(error, nodes)) from None
    except (RendezvousError, dist.DistError) as error:
        assert nodes is not None
        if "is_host=1" in where[-1] and isinstance(error, RendezvousConnectionError):
            _torchrun(command, nodes)  # another launcher of this machine was faster
            return
        raise InputError(nodes.parted(error)) from None


def _why(error: ChildFailedError, nodes: Nodes | None) -> int:
    """The exit code, after the line of what has ended a process that could not say so itself, or that left it here."""
    _, first = error.get_first_failure()
    # torchrun sends SIGTERM to those that are left, and SIGKILL half a minute later.
    killed = {
        rank: -each.exitcode
        for rank, each in error.failures.items()
        if each.exitcode < 0
        and each.exitcode != -signal.SIGTERM
        and each.timestamp < first.timestamp + PATIENCE
    }
    for rank, number in killed.items():
        node = f"node {socket.gethostname()}, " if nodes else ""
        line = f"rank {rank} was killed ({signal.Signals(number).name}); the same command continues"
        print(f"error: {node}{line}", file=sys.stderr, flush=True)
    left = [each.message for each in error.failures.values() if each.error_file != SILENT]
    said = [
        each.exitcode
        for each in error.failures.values()
        if each.error_file == SILENT and each.exitcode > 0 and each.exitcode != INTERRUPTED
    ]
    if left and not killed and not said:
        print(f"error: {left[0]}", file=sys.stderr, flush=True)
    codes = [*(-number for number in killed.values()), *said, *(2 for _ in left), first.exitcode]
    return codes[0] if codes[0] > 0 else 128 - codes[0]  # 128 + n: killed by signal n


if __name__ == "__main__":
    os.environ.pop("SLURM_STEP_ID", None)  # a task of srun that starts processes is none of them
    run_stage(main)

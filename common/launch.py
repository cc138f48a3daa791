"""python -m common.launch 4 train --layer 17: a stage in several processes, which end as one process would.

Whatever ends a process, torchrun itself prints a traceback of its own and exits with 1. Here the processes have said
why they stopped, and the exit code is that of the first that stopped.

On several nodes every node runs this command, with --nodes 4 --head host:port before the number of processes.
torchrun's c10d rendezvous on the head's port brings the nodes together (common/nodes/meeting.py). With --max-restarts 3
all processes are restarted, up to three times, when one has ended; they continue from the last checkpoint.

Stages that work on one layer at a time take several layers here too: one after another in all processes, or, with
--spread layers, each layer in a process of its own (common/layers/).
"""

import importlib.util
import logging
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from functools import partial, wraps

# Also in the processes: PyTorch's C++ would log a page of addresses for every connection that is refused or lost.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch.distributed as dist
from torch.distributed import run
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousError

from common.cli import run_stage
from common.errors import InputError
from common.layers import driver
from common.nodes.environment import LAUNCHER
from common.nodes.meeting import Nodes

ONE_LAYER = ("train", "train.sweep", "evaluate", "evaluate.compare")
"""Stages that work on one layer at a time: common/layers/driver.py runs several."""
OPTIONS = ("--nodes", "--head", "--max-restarts")
SILENT = "<N/A>"
"""What torchrun gives as the error file of a process that has left no message."""
PATIENCE = 25
"""Seconds after the first failure; torchrun kills the processes that have not ended after 30."""
INTERRUPTED = 130
MOST = 1024
"""Processes of a node: more are a slip of the finger, and take all of its memory before anything is said."""


def main() -> None:
    words, given = sys.argv[1:], dict[str, str]()
    while words and (option := words[0].partition("="))[0] in OPTIONS:
        name, equals, value = option
        given[name] = value if equals or len(words) < 2 else words.pop(1)
        words.pop(0)
    if len(words) < 2:
        raise InputError(
            "launch: expected a number of processes and a stage, for example: "
            "python -m common.launch 4 train --layer 17"
        )
    processes, stage, *arguments = words
    if not (processes.isdecimal() and 0 < int(processes) <= MOST):
        raise InputError(f"NPROC: expected a whole number of processes, 1 to {MOST}, found {processes!r}")
    if not _is_module(stage):
        raise InputError(f"launch: {stage!r} is no stage; expected harvest or one of {', '.join(ONE_LAYER)}")
    restarts = given.get("--max-restarts")
    if restarts is not None and not restarts.isdecimal():
        raise InputError(f"RESTARTS: expected a whole number of restarts, 0 or more, found {restarts!r}")
    again = ["--max-restarts", restarts] if restarts else []
    nodes = Nodes.of(given.get("--nodes"), given.get("--head"))
    _tell_of_restarts(nodes, int(processes))
    # "--" because torchrun would take --run for an option of its own.
    command = [*again, "--nproc-per-node", processes, "-m", "--", stage, *arguments]
    together = partial(_torchrun, command, nodes, int(processes))
    if stage not in ONE_LAYER:
        together()
        return
    driver.launch = driver.Launch(int(processes), stage, together, tuple(again), one_node=nodes is None)
    sys.argv = [stage, *arguments]
    importlib.import_module(stage if "." in stage else f"{stage}.__main__").main()


def _is_module(name: str) -> bool:
    """Whether there is a module to start."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # of its package; an empty name
        return False


def _torchrun(command: Sequence[str], nodes: Nodes | None, per_node: int) -> None:
    logging.disable()  # the launcher's: which process was sent which signal
    # Each start of the processes gets a store of its own: the launchers' store keeps the addresses from before a
    # restart, and the new processes would wait for those.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    os.environ[LAUNCHER] = f"{os.getpid()}"
    where = nodes.options(command) if nodes else ["--standalone"]
    try:
        run.main([*where, *command])
    except SignalException:  # torchrun has passed the signal on, and waited
        raise KeyboardInterrupt from None
    except ChildFailedError as error:
        raise SystemExit(_why(error, nodes, per_node)) from None
    except (RendezvousError, dist.DistError) as error:
        assert nodes is not None
        if "is_host=1" in where[-1] and isinstance(error, RendezvousConnectionError):
            _torchrun(command, nodes, per_node)  # another launcher of this machine took the port first
            return
        raise InputError(nodes.parted(error)) from None
    finally:
        os.environ.pop(LAUNCHER, None)


def _tell_of_restarts(nodes: Nodes | None, per_node: int) -> None:
    """Have torchrun's agent, before it starts all processes again, print the line of one that was killed."""
    look = LocalElasticAgent._monitor_workers  # pyright: ignore[reportPrivateUsage]

    @wraps(look)
    def told(agent: LocalElasticAgent, group: WorkerGroup) -> RunResult:
        result = look(agent, group)  # pyright: ignore[reportCallIssue]
        if result.failures and agent._remaining_restarts > 0:  # pyright: ignore[reportPrivateUsage]
            _say_killed(result.failures, nodes, per_node, "note", "all processes are started again")
        return result

    LocalElasticAgent._monitor_workers = told  # pyright: ignore[reportPrivateUsage]


def _node(rank: int, per_node: int) -> str:
    """This node, of which `rank` is a process; every node has `per_node`."""
    return f"node {rank // per_node} ({socket.gethostname()})"


def _say_killed(
    failures: Mapping[int, ProcessFailure], nodes: Nodes | None, per_node: int, word: str, then: str
) -> dict[int, int]:
    """Rank -> signal of the processes that were killed, each after its line."""
    first = min(each.timestamp for each in failures.values())
    # torchrun sends SIGTERM to the remaining processes, and SIGKILL half a minute later.
    killed = {
        rank: -each.exitcode
        for rank, each in failures.items()
        if each.exitcode < 0 and each.exitcode != -signal.SIGTERM and each.timestamp < first + PATIENCE
    }
    for rank, number in killed.items():
        node = f"{_node(rank, per_node)}, " if nodes else ""
        line = f"{word}: {node}rank {rank} was killed ({signal.Signals(number).name}); {then}"
        # rank 0 has left the bar's line unfinished in a terminal
        print("\n" * (rank == 0 and sys.stderr.isatty()) + line, file=sys.stderr, flush=True)
    return killed


def _why(error: ChildFailedError, nodes: Nodes | None, per_node: int) -> int:
    """The exit code. Prints the line of a process that was killed, or that left its line to the launcher."""
    _, first = error.get_first_failure()
    killed = _say_killed(error.failures, nodes, per_node, "error", "the same command continues")
    left = [each.message for each in error.failures.values() if each.error_file != SILENT]
    said = [
        each.exitcode
        for each in error.failures.values()
        if each.error_file == SILENT and each.exitcode > 0 and each.exitcode != INTERRUPTED
    ]
    if left and not killed and not said:
        print(f"error: {left[0]}", file=sys.stderr, flush=True)
    # torchrun ends a rank of an interrupted node that is later than the first
    if nodes and {each.exitcode for each in error.failures.values()} <= {INTERRUPTED, -signal.SIGTERM}:
        here = _node(min(error.failures), per_node)
        line = f"interrupted: {here} stops with another node; the same command continues"
        print(line, file=sys.stderr, flush=True)
    codes = [*(-number for number in killed.values()), *said, *(2 for _ in left), first.exitcode]
    return codes[0] if codes[0] > 0 else 128 - codes[0]  # 128 + n: killed by signal n


if __name__ == "__main__":
    os.environ.pop("SLURM_STEP_ID", None)  # a launcher that srun has started is not one of the processes
    run_stage(main)

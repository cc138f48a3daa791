"""Which of a run's processes this one is, from the variables of torchrun, accelerate and PyTorchJob, or of srun.

Does not import torch: a stage asks before it imports anything.
"""

import ctypes
import os
import re
import signal
import socket
import sys

from common.errors import InputError

MOST = 2**20
"""There are fewer processes than this."""
MEETING = ("RANK", "MASTER_ADDR", "MASTER_PORT")
PORTS = range(12000, 32000)
"""For jobs of Slurm, which assigns no ports: below the ports that the kernel gives to outgoing connections."""

LAUNCHER = "MATRYOSHKA_LAUNCHER"
"""The process number of common/launch.py, for the processes that it starts."""
PR_SET_PDEATHSIG = 1


def end_with_launcher() -> None:
    """Have Linux tell this process to stop (SIGTERM) when its launcher has ended, also by a kill -9.

    Nothing else would stop it: it would go on, and the same command would be refused for as long.
    """
    launcher = os.environ.pop(LAUNCHER, None)  # it is not the parent of what this process starts
    if launcher is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if f"{os.getppid()}" != launcher:  # it had ended before
        os.kill(os.getpid(), signal.SIGTERM)


def rank() -> int:
    """This process's number, from 0."""
    return _number("RANK", 0, range(world())) if world() > 1 else 0


def world() -> int:
    """How many processes there are; 1 without a launcher.

    Raises `InputError` if WORLD_SIZE is left over from another program: the other processes would never come.
    """
    size = _number("WORLD_SIZE", 1, range(1, MOST))
    if size > 1 and (missing := [name for name in MEETING if not os.environ.get(name)]):
        raise InputError(
            f"environment: WORLD_SIZE={size}, but no {', '.join(missing)}: torchrun, which sets all of them, did not "
            f"start this process; unset WORLD_SIZE for one process, or give NPROC={size} (make)"
        )
    return size


def here() -> int:
    """How many of the processes share this machine's cores; 1 where no launcher says it: in a pod and under srun each
    process has cores of its own.
    """
    return _number("LOCAL_WORLD_SIZE", 1, range(1, world() + 1)) if world() > 1 else 1


def place() -> str:
    """The beginning of a line of one of several processes, 'node 1 (gpu-17), rank 9: '; empty for a single process.

    The node is named if there are several, its number if the launcher gives one. Never raises.
    """
    try:
        if world() == 1:
            return ""
        if world() == here():
            return f"rank {rank()}: "
        number = os.environ.get("GROUP_RANK") or os.environ.get("SLURM_NODEID", "")
        node = f"{number} ({socket.gethostname()})" if number else socket.gethostname()
        return f"node {node}, rank {rank()}: "
    except InputError:
        return ""


def _number(name: str, default: int, allowed: range) -> int:
    text = os.environ.get(name) or str(default)
    if not (text.isdecimal() and int(text) in allowed):
        raise InputError(
            f"environment: {name}: expected a whole number from {allowed.start} to {allowed.stop - 1}, found {text!r}; "
            "the launcher (torchrun, srun) sets it; unset it if there is none"
        )
    return int(text)


def recognise_srun() -> None:
    """Set torchrun's variables if srun has started several tasks and WORLD_SIZE is not set; else change nothing.

    A batch script has SLURM_PROCID and SLURM_NTASKS too, but is not a task of srun: SLURM_STEP_ID marks the tasks.
    Raises `InputError` if one of srun's variables is missing.
    """
    given = os.environ
    # In a shell of salloc SLURM_NTASKS is the job's number of tasks, SLURM_STEP_NUM_TASKS that of this step.
    tasks = given.get("SLURM_STEP_NUM_TASKS") or given.get("SLURM_NTASKS", "1")
    if "SLURM_STEP_ID" not in given or given.get("WORLD_SIZE") or tasks == "1":
        return
    needed = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_JOB_NODELIST")
    if missing := [name for name in needed if not given.get(name)]:
        raise InputError(
            f"environment: SLURM_STEP_ID={given['SLURM_STEP_ID']}, but no {', '.join(missing)}: srun, which sets all "
            "of them, did not start this process; unset SLURM_STEP_ID for one process"
        )
    job = _number("SLURM_JOB_ID", 0, range(2**32))
    nodes = given.get("SLURM_STEP_NODELIST") or given["SLURM_JOB_NODELIST"]
    own = {
        "RANK": given["SLURM_PROCID"],
        "LOCAL_RANK": given["SLURM_LOCALID"],
        "WORLD_SIZE": tasks,
        "MASTER_ADDR": first_host(nodes),
        "MASTER_PORT": str(PORTS[job % len(PORTS)]),
    }
    for name, value in own.items():
        given.setdefault(name, value)


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list.

    >>> first_host("gpu[003-005,7]"), first_host("a1,b[2-4]"), first_host("r[1,3]n[07-09]-ib,x")
    ('gpu003', 'a1', 'r1n07-ib')
    """
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0] if first else nodes)

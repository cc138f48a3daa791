"""python -m common.launch 4 train --layer 17: a stage in several processes, which end as one would.

torchrun itself shows a traceback of its own, and exit code 1, for whatever ends a process; here the processes have
said why they stopped, and the exit code is that of the first that did.

Stages that work on one layer at a time take several here too: one after another in all processes, or, with
--spread layers, each in a process of its own (common/layers/).
"""

import importlib
import logging
import sys
from collections.abc import Sequence
from functools import partial

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from common.cli import run_stage
from common.errors import InputError
from common.layers import driver

ONE_LAYER = ("train", "train.sweep", "evaluate", "evaluate.compare")
"""Stages that work on one layer at a time, by common/layers/driver.py."""


def main() -> None:
    if len(sys.argv) < 3:
        raise InputError(
            "launch: expected processes and a stage, for example: python -m common.launch 4 train --layer 17"
        )
    processes, stage, *arguments = sys.argv[1:]
    if not (processes.isdecimal() and int(processes)):
        raise InputError(f"NPROC: expected a number of processes from 1, found {processes!r}")
    together = partial(_torchrun, processes, stage, arguments)
    if stage not in ONE_LAYER:
        together()
        return
    driver.launch = driver.Launch(int(processes), stage, together)
    sys.argv = [stage, *arguments]
    importlib.import_module(stage if "." in stage else f"{stage}.__main__").main()


def _torchrun(processes: str, stage: str, arguments: Sequence[str]) -> None:
    logging.disable()  # of the launcher: who was sent which signal when one had stopped
    try:
        # "--" because torchrun would take --run for an option of its own.
        run.main(["--standalone", "--nproc-per-node", processes, "-m", "--", stage, *arguments])
    except SignalException:  # it has passed the signal on, and waited
        raise KeyboardInterrupt from None
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        code = failure.exitcode
        raise SystemExit(code if code > 0 else 128 - code) from None  # 128 + n: killed by signal n


if __name__ == "__main__":
    run_stage(main)

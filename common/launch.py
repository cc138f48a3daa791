"""python -m common.launch 4 train --layer 17: a stage in several processes, which end as one would.

torchrun itself shows a traceback of its own, and exit code 1, for whatever ends a process; here the processes have
said why they stopped, and the exit code is that of the first that did.
"""

import logging
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from common.cli import run_stage
from common.errors import InputError


def main() -> None:
    if len(sys.argv) < 3:
        raise InputError(
            "launch: expected processes and a stage, for example: python -m common.launch 4 train --layer 17"
        )
    processes, stage, *arguments = sys.argv[1:]
    if not (processes.isdecimal() and int(processes)):
        raise InputError(f"NPROC: expected a number of processes from 1, found {processes!r}")
    logging.disable()  # of the launcher: who was sent which signal when one had stopped
    try:
        # "--" because torchrun would take --run for an option of its own.
        run.main(["--standalone", "--nproc-per-node", processes, "-m", "--", stage, *arguments])
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        code = failure.exitcode
        raise SystemExit(code if code > 0 else 128 - code) from None  # 128 + n: killed by signal n


if __name__ == "__main__":
    run_stage(main)

"""The ground floor: settings, command line, errors, files, devices, processes. Imports nothing of the stages."""

import os
import signal
import sys
from types import FrameType
from typing import NoReturn


def launched() -> bool:
    """Whether torchrun has started this process: it says of all what ends them together, once."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def stop_at_once(number: int, frame: FrameType | None) -> NoReturn:
    """End a stage that has begun nothing: while it imports, an exception would be a traceback, or swallowed."""
    if not launched():
        os.write(2, b"interrupted: the same command continues\n")
    os._exit(130)


# `python -m stage` imports the stage's package first, with this as its name, then for a second the rest, until
# common.cli.run_stage answers signals itself. Every package imports this one. Not in a notebook or a script of its own.
if getattr(sys, "argv", [])[:1] == ["-m"]:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop_at_once)

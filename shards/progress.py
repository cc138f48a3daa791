"""The bar of whatever takes long."""

import sys
from typing import Any

from tqdm.auto import tqdm

LOG_SECONDS = 20


def progress(what: str, total: int, unit: str, done: int = 0) -> "tqdm[Any]":
    """A bar on standard error with speed in `unit` a second and the time that is left; `update(n)` moves it.

    In a terminal or a notebook it moves all the time; in a log file it is a line every LOG_SECONDS.
    """
    live = sys.stderr.isatty() or "ipykernel" in sys.modules
    return tqdm(
        desc=what,
        total=total,
        initial=done,
        unit=unit if unit == "B" else f" {unit}",
        unit_scale=True,
        dynamic_ncols=True,
        mininterval=0.5 if live else LOG_SECONDS,
    )

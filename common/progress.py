"""The bar of whatever takes long."""

import sys
from typing import Any, TextIO

from tqdm.auto import tqdm

from common.nodes.environment import rank

LOG_SECONDS = 20


class Lines:
    """A log file as a bar writes to it: tqdm returns to the start of its line, and here begins the next one."""

    def __init__(self, log: TextIO) -> None:
        self._log, self.encoding = log, log.encoding

    def write(self, text: str) -> None:
        """Write what `text` shows, as a line; nothing when it shows nothing."""
        if shown := text.strip():
            self._log.write(f"{shown}\n")

    def flush(self) -> None:
        """Hand on what was written."""
        self._log.flush()


def progress(what: str, total: int, unit: str, initial: int = 0) -> "tqdm[Any]":
    """A bar on standard error with speed in `unit` a second and the time that is left; `update(n)` moves it.

    In a terminal or a notebook it moves all the time; in a log file it is a line every LOG_SECONDS. Of several
    processes the first shows it.
    """
    live = _is_live()
    return tqdm(
        desc=what,
        disable=rank() > 0,
        total=total,
        initial=initial,
        unit=unit if unit == "B" else f" {unit}",
        unit_scale=True,
        dynamic_ncols=True,
        mininterval=0.5 if live else LOG_SECONDS,
        miniters=1,  # else tqdm guesses how many updates that is, and its watchdog prints between them
        file=sys.stderr if live else Lines(sys.stderr),
        position=None if live else 0,  # one below the other is for terminals
    )


def show_wait(bar: "tqdm[Any]", why: str) -> None:
    """Show `why` at the bar's end now, for nothing may move it for long; in a log file at most every LOG_SECONDS."""
    bar.set_postfix_str(why, refresh=False)
    if bar.disable:
        return
    now = bar.start_t + bar.format_dict["elapsed"]
    if _is_live() or now - bar.last_print_t >= bar.mininterval:
        bar.refresh()
        bar.last_print_t = now


def _is_live() -> bool:
    """In a terminal or a notebook, where a bar can be drawn again."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules

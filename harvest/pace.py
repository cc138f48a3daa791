"""What a harvest's threads spend their time on, and what it would be faster without."""

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping

WAITED = 0.1
"""Share of the time that the model's thread may wait for the others, and the model still be what takes longest."""
LEAST = 0.05
"""Seconds that are mentioned."""
WAITING = "waiting"
STEPS = {
    "model": "model",
    "copy": "copies",
    "compression": "compression",
    "disk": "disk",
    "upload": "uploads",
}
"""What a window that is written waits for, or takes, one after the other; and as the line names it."""


class Pace:
    """Seconds by what they are spent on: `waiting` of the thread that runs the model, STEPS of those that write."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys((WAITING, *STEPS), 0.0)
        self._lock = threading.Lock()
        self._begun = time.perf_counter()

    @contextlib.contextmanager
    def during(self, what: str) -> Iterator[None]:
        """Count the time within, also where it ends with an error."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self.seconds[what] += time.perf_counter() - begun

    def line(self, tokens: int, processes: int = 1) -> str:
        """Of a harvest that has just ended, with so many tokens in this one of `processes`."""
        line = described(tokens, time.perf_counter() - self._begun, self.seconds)
        return line if processes == 1 else f"{line}; of the first of {processes} processes"


def described(tokens: int, total: float, seconds: Mapping[str, float]) -> str:
    """The summary line of `tokens` in `total` seconds."""
    waited = seconds[WAITING] / total
    slowest = max(STEPS, key=lambda step: seconds[step]) if waited > WAITED else "model"
    spent = {name: seconds[step] for step, name in STEPS.items() if seconds[step] >= LEAST}
    writing = ", ".join(f"{name} {each:,.1f} s" for name, each in spent.items())
    return (
        f"harvest: {tokens:,} tokens in {total:,.1f} s, {tokens / total:,.0f} a second; bottleneck: {STEPS[slowest]} "
        f"(the model waited {waited:.0%} of the time for the threads that write; they took {writing or 'no time'})"
    )

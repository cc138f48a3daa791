"""Where windows wait for their upload: bounded room on a local disk, and the threads that upload."""

import contextlib
import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from common.errors import InputError
from shards.plan import human

WINDOWS = 8
"""Uploaded side by side: a file of a window after the other, at 50 ms each most of them wait."""


class Scratch:
    """`limit` bytes below `folder` for the windows, and the text, of all stores that this process writes."""

    def __init__(self, folder: Path, limit: int, rank: int = 0) -> None:
        self._folder, self._limit, self._rank = folder, limit, rank
        self._text = self._taken = 0
        self._changed = threading.Condition()
        self._pool: ThreadPoolExecutor | None = None

    def of(self, url: str) -> Path:
        """The directory of one store; processes on one machine do not share it."""
        return self._folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{self._rank}"

    def keep(self, text: int) -> None:
        """Note bytes that stay until the end."""
        with self._changed:
            self._text += text

    def refuse(self, url: str, window: int) -> None:
        """Raise `InputError` where a window of so many bytes never fits."""
        if window > self._limit - self._text:
            raise InputError(
                f"paths.scratch_bytes: {human(self._limit)}, but a window of {url} takes up to {human(window)}, beside "
                f"{human(self._text)} of text; give at least {human(1.05 * (window + self._text))}"
            )

    def take(
        self, count: int, waiting: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
    ) -> None:
        """Wait until so many bytes are free, within `waiting` where they are not yet, and take them."""
        with self._changed:
            if not self._has_room(count):
                with waiting():
                    self._changed.wait_for(lambda: self._has_room(count))
            self._taken += count

    def _has_room(self, count: int) -> bool:
        return self._taken + count <= self._limit - self._text

    def give_back(self, count: int) -> None:
        """The opposite of `take`."""
        with self._changed:
            self._taken -= count
            self._changed.notify_all()

    def submit(self, work: Any, *arguments: Any) -> "Future[None]":
        """Have `work` done by a thread."""
        with self._changed:
            self._pool = self._pool or ThreadPoolExecutor(WINDOWS)
        return self._pool.submit(work, *arguments)

    def close(self) -> None:
        """Until no upload is under way; those that have not begun are given up."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

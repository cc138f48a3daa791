"""The threads that write windows give way to the model."""

import errno
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from harvest.windows import _after_the_model


def priority_after(before: int) -> int:
    """Of a thread that had `before`."""

    def work() -> int:
        me = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, me, before)
        _after_the_model()
        return os.getpriority(os.PRIO_PROCESS, me)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


@pytest.mark.skipif(sys.platform != "linux", reason="priorities of threads")
def test_a_lower_priority_stays() -> None:
    """`nice -n 19 make harvest`: only root may go back to 10, anybody else's thread pool broke."""
    now = os.getpriority(os.PRIO_PROCESS, 0)
    for before in {max(now, 10), max(now, 15), 19}:
        assert priority_after(before) == before
    if now < 10:
        assert priority_after(now) == 10


@pytest.mark.skipif(sys.platform != "linux", reason="priorities of threads")
@pytest.mark.parametrize("number", [errno.EPERM, errno.EACCES, errno.ENOSYS])
def test_a_container_that_lets_nobody_change_priorities(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "setpriority", refuses)
    with ThreadPoolExecutor(1, initializer=_after_the_model) as pool:
        assert pool.submit(lambda: 1).result() == 1

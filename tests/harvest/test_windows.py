"""The threads that write windows: they give way to the model, and end what they have begun."""

import errno
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from common.settings import Settings
from harvest import windows
from harvest.run import harvest
from harvest.windows import _after_the_model
from shards.writer import StoreWriter


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


@pytest.mark.usefixtures("small_windows")
def test_a_failure_lets_the_windows_being_written_end(
    llama: Path, settings_for: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model fails at the second window while the first one is being written."""
    write, fill, failed = StoreWriter.write_window, windows.fill_window, threading.Event()
    begun: list[tuple[Any, ...]] = []
    filled: list[int] = []

    def fails_at_the_second(*args: Any) -> None:
        filled.append(1)
        if len(filled) == 2:
            threading.Timer(0.2, failed.set).start()  # by then the pools are being left
            raise RuntimeError("the model fails")
        fill(*args)

    def slow(self: StoreWriter, *args: Any) -> None:
        begun.append(args[:2])
        failed.wait(10)
        write(self, *args)

    monkeypatch.setattr(windows, "fill_window", fails_at_the_second)
    monkeypatch.setattr(StoreWriter, "write_window", slow)
    with pytest.raises(RuntimeError, match="the model fails"):
        harvest(settings_for(llama))
    assert len(begun) == 1
    monkeypatch.setattr(windows, "fill_window", fill)
    harvest(settings_for(llama))
    assert len(set(begun)) == len(begun)  # the first window was not written again


@pytest.mark.usefixtures("small_windows")
def test_a_harvest_to_a_disk_waits_for_no_uploads(
    llama: Path,
    settings_for: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("common.progress.LOG_SECONDS", 0.0)
    harvest(settings_for(llama))
    said = capfd.readouterr().err
    assert "harvest: 100%" in said
    assert "uploads" not in said

"""A bar in a log file."""

import io
import re
import sys

import pytest

from common import progress as bars
from common.progress import progress, show_wait


def log_file(monkeypatch: pytest.MonkeyPatch) -> io.TextIOWrapper:
    """Standard error as a log file. Not a fixture: pytest puts its own standard error there between the two."""
    log = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="")
    monkeypatch.setattr("sys.stderr", log)
    # Another test may have imported it: the bars of a notebook are live.
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    return log


def test_a_log_file_has_a_line_for_every_state(monkeypatch: pytest.MonkeyPatch) -> None:
    log = log_file(monkeypatch)
    monkeypatch.setattr(bars, "LOG_SECONDS", 0)
    with progress("harvest", 3000, "tokens") as bar, progress("harvest", 10, "tokens") as other:
        other.update(10)
        for _ in range(3):
            bar.update(1000)
    log.seek(0)
    lines = log.read().split("\n")
    assert lines.pop() == ""
    assert len(lines) >= 6
    assert all(re.match(r"harvest: +\d+%\|.*tokens/s\]$", line) for line in lines), lines
    assert "100%|██████████| 3.00k/3.00k" in lines[-1]


def test_a_wait_shows_at_once_but_not_in_every_line_of_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    log = log_file(monkeypatch)
    monkeypatch.setattr(bars, "LOG_SECONDS", 1000)
    with progress("harvest", 3000, "tokens") as bar:
        show_wait(bar, "waiting for uploads")
        bar.last_print_t -= 1001
        show_wait(bar, "waiting for uploads")
        show_wait(bar, "waiting for uploads")
        log.seek(0)
        assert log.read().count("waiting for uploads") == 1
        monkeypatch.setattr(log, "isatty", lambda: True)
        show_wait(bar, "waiting for uploads")
        log.seek(0)
        assert log.read().count("waiting for uploads") == 2


def test_a_bar_of_another_process_shows_no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    log = log_file(monkeypatch)
    monkeypatch.setattr(bars, "rank", lambda: 1)
    with progress("harvest", 3000, "tokens") as bar:
        show_wait(bar, "waiting for uploads")
    log.seek(0)
    assert not log.read()

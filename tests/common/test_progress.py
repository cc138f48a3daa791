"""A bar in a log file."""

import io
import re
import sys

import pytest

from common import progress as bars
from common.progress import progress


def test_a_log_file_has_a_line_for_every_state(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="")
    monkeypatch.setattr("sys.stderr", log)
    # Another test may have imported it: the bars of a notebook are live.
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
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

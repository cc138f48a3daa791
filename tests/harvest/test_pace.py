"""The line that names what a harvest waits for."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest

from common.settings import Settings
from harvest import pace
from harvest.pace import WAITING, Pace, described
from harvest.run import harvest
from shards import writer


@pytest.mark.parametrize(
    ("seconds", "named"),
    [
        ({}, "model"),
        ({WAITING: 0.9, "compression": 80, "disk": 3}, "model"),  # threads beside it, in time
        ({WAITING: 5, "compression": 40, "disk": 3}, "compression"),
        ({WAITING: 5, "compression": 1, "disk": 3}, "disk"),
        ({WAITING: 5, "copy": 4, "compression": 1}, "copies"),
        ({WAITING: 5, "model": 6, "compression": 4}, "model"),  # a GPU computes what was asked for long ago
    ],
)
def test_the_slowest_is_named(seconds: dict[str, float], named: str) -> None:
    line = described(20_000, 10.0, Pace().seconds | seconds)
    assert line.startswith(f"harvest: 20,000 tokens in 10.0 s, 2,000 a second; bottleneck: {named} (")
    assert f"waited {seconds.get(WAITING, 0) * 10:.0f}% of the time" in line
    assert (f"compression {seconds.get('compression', 0):.1f} s" in line) == ("compression" in seconds)
    assert line.endswith("they took no time)") == (not seconds)


def test_seconds_of_several_threads_add_up_also_of_those_that_fail() -> None:
    spent, both = Pace(), threading.Barrier(2)

    def work() -> None:
        with spent.during("disk"):
            both.wait()
            time.sleep(0.05)
            raise ValueError

    with ThreadPoolExecutor(2) as pool:
        errors = [future.exception() for future in [pool.submit(work), pool.submit(work)]]
    assert all(isinstance(error, ValueError) for error in errors)
    assert 0.1 <= spent.seconds["disk"] < 30


def test_the_line_of_several_processes_is_of_the_first() -> None:
    """Whose windows it counts."""
    assert Pace().line(1000, 8).endswith("; of the first of 8 processes")
    assert "processes" not in Pace().line(1000)


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize(("slow", "named"), [("encode_rows", "compression"), ("write_whole", "disk")])
def test_a_harvest_ends_with_the_line(
    slow: str,
    named: str,
    llama: Path,
    settings_for: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On a clock that is put on by a minute in each call of what is slow: it hides how fast this machine is."""
    function, minutes = getattr(writer, slow), count(1)
    passed = [0.0]

    def slowly(*args: object) -> object:
        passed[0] = 60.0 * next(minutes)
        return function(*args)

    clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() + passed[0])
    settings = settings_for(llama, rows=1000)
    with monkeypatch.context() as patch:
        patch.setattr(writer, slow, slowly)
        patch.setattr(pace, "time", clock)
        harvest(settings)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("harvest: ")]
    assert len(lines) == 1
    assert f"; bottleneck: {named} (" in lines[0]
    harvest(settings)
    assert "bottleneck" not in capsys.readouterr().out  # nothing was to be done

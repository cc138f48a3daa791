"""Cores are shared with other programs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common import device
from common.device import busy_ticks, share_cores, threads_beside
from common.settings import ROOT

STAT = """cpu  100 10 20 900 5 1 2 0 0 0
cpu0 60 5 10 400 5 1 1 0 0 0
cpu1 40 5 10 500 0 0 1 0 0 0
cpu10 1 1 1 1 1 1 1 0 0 0
intr 12345
"""


@pytest.mark.parametrize(("cores", "ticks"), [({0}, 77), ({1}, 56), ({0, 1}, 133), ({10}, 5), (set(), 0)])
def test_ticks_of_the_process_s_own_cores(cores: set[int], ticks: int) -> None:
    assert busy_ticks(STAT, cores) == ticks


@pytest.mark.parametrize(
    ("taken", "cores", "threads"),
    [(0.0, 2, 2), (0.4, 2, 2), (0.6, 2, 1), (1.0, 2, 1), (7.0, 2, 1), (1.2, 8, 7)],
)
def test_a_thread_less_for_each_busy_core(taken: float, cores: int, threads: int) -> None:
    assert threads_beside(taken, cores) == threads


def test_a_number_of_threads_that_was_asked_for_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(device, "STAT", None)  # would raise if it were looked at
    share_cores()


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="no /proc/stat")
def test_beside_a_busy_program_it_takes_fewer_and_says_so() -> None:
    env = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    code = (
        "from common.device import share_cores; share_cores(); import torch; print(torch.get_num_threads())"
    )
    cores = os.sched_getaffinity(0)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in cores]
    try:
        process = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True
        )
    finally:
        for each in busy:
            each.kill()
            each.wait()
    if len(cores) > 1:
        assert process.stdout.strip() == "1"
        assert process.stderr.startswith(f"threads: 1 of {len(cores)}, as other programs keep ")

"""Layers in processes of their own: some at a time, what they print, how they end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from common.device import cores
from common.layers import spread
from common.settings import ROOT

Capture = pytest.CaptureFixture[str]
STAGE = """
import os, sys, time
layer, do = sys.argv[1], sys.argv[2]
open(f"{layer}.begun", "w").write(os.environ.get("OMP_NUM_THREADS", ""))
print("out of", layer, flush=True)
print("half a line", end="", file=sys.stderr, flush=True)
end = time.monotonic() + 300
while do == "wait" and time.monotonic() < end:
    time.sleep(0.01)
while do == "meet" and len([name for name in os.listdir() if name.endswith(".begun")]) < 2:
    time.sleep(0.01)
if do == "die":
    os.kill(os.getpid(), 9)
raise SystemExit(int(do) if do.isdecimal() else 0)
"""
"""Does what it is told: ends with a code, waits for a signal, or until a second one has begun."""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "stage.py").write_text(STAGE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{tmp_path}")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return tmp_path


def commands(*does: str) -> dict[int, list[str]]:
    return {layer: ["stage", str(layer), do] for layer, do in enumerate(does)}


def test_so_many_work_at_a_time_and_a_failed_one_stops_none(capsys: Capture) -> None:
    """Two meet, so they are there at once; each has its share of the cores, and its number on every line."""
    assert spread.each(commands("meet", "meet", "2", "0", "2"), 2) == [2, 4]
    said = capsys.readouterr()
    assert sorted(said.out.splitlines()) == [f"layer {n} | out of {n}" for n in range(5)]
    assert sorted(said.err.splitlines()) == [f"layer {n} | half a line" for n in range(5)]
    assert {Path(f"{n}.begun").read_text() for n in range(5)} == {str(max(1, cores() // 2))}


def test_one_after_another_has_the_terminal(capfd: Capture) -> None:
    assert spread.each(commands("0", "2", "0"), 1) == [1]
    lines = capfd.readouterr().out.splitlines()
    assert lines == [line for n in range(3) for line in (f"layer {n} ({n + 1} of 3)", f"out of {n}")]


@pytest.mark.parametrize(("do", "code"), [("1", 1), ("die", 137)])
def test_whatever_else_ends_one_stops_all(do: str, code: int, capsys: Capture) -> None:
    began = time.monotonic()
    with pytest.raises(SystemExit) as stopped:
        spread.each(commands("wait", do, "0"), 2)
    assert stopped.value.code == code
    assert time.monotonic() - began < 200
    last = capsys.readouterr().err.splitlines()[-2:]
    expected = {"1": "code 1", "die": "code -9"}[do]
    assert f"layer 1 ended with {expected}; the others are stopped, the same command continues" in last
    assert not Path("2.begun").exists()


def test_ctrl_c_stops_all_and_waits_for_them(capsys: Capture) -> None:
    """It comes to this process alone; each of the others is told once, and its state is kept before this one ends."""
    end = os.getpid()
    watch = f"while [ ! -e 0.begun ] || [ ! -e 1.begun ]; do sleep 0.05; done; kill -INT {end}"
    with subprocess.Popen(["sh", "-c", watch]) as shell:
        with pytest.raises(KeyboardInterrupt):
            spread.each(commands("wait", "wait", "0"), 2)
        assert shell.wait() == 0
    assert not Path("2.begun").exists()


DRIVER = (
    "from common.layers import spread; spread.each({0: ['stage', '0', 'wait'], 1: ['stage', '1', 'wait']}, 2)"
)


def test_a_killed_driver_takes_its_processes_with_it(here: Path) -> None:
    """kill -9 of the driver: the pipe that each child reads ends."""
    with subprocess.Popen([sys.executable, "-c", DRIVER]) as driver:
        while not all(Path(f"{n}.begun").exists() for n in (0, 1)):
            time.sleep(0.02)
        driver.send_signal(signal.SIGKILL)
    end = time.monotonic() + 100
    while time.monotonic() < end and _with(here):
        time.sleep(0.05)
    assert not _with(here)


def _with(here: Path) -> list[str]:
    """Processes whose current directory is this test's, but this one."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink() == here and int(process.name) != os.getpid():
                found.append(process.name)
        except OSError:
            continue  # it has ended, or is another user's
    return found


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [spread.own_share(place, 3)["CUDA_VISIBLE_DEVICES"] for place in range(3)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert [spread.own_share(place, 2) for place in range(2)] == [
        {"CUDA_VISIBLE_DEVICES": "5"},
        {"CUDA_VISIBLE_DEVICES": "3"},
    ]

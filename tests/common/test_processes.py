"""Several processes: what the environment says of them, and waits that a signal ends."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from common import processes
from common.device import pick_device
from common.errors import InputError
from common.settings import ROOT

ALL = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*ALL, "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank without a world is somebody else's."""
    assert (processes.rank(), processes.world()) == (0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for size in ("", "1"):
        monkeypatch.setenv("WORLD_SIZE", size)
        assert (processes.rank(), processes.world()) == (0, 1)
        assert pick_device("auto") == torch.device("cuda")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"RANK": "", "MASTER_ADDR": "", "MASTER_PORT": ""},
            "but no RANK, MASTER_ADDR, MASTER_PORT: torchrun",
        ),
        (
            {"MASTER_PORT": ""},
            "WORLD_SIZE=2, but no MASTER_PORT: torchrun, which sets all of them, did not start",
        ),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: expected a whole number from 1 to .*, found 'two'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: expected a whole number from 1 to .*, found '0'"),
        ({"RANK": "2"}, "RANK: expected a whole number from 0 to 1, found '2'"),
        ({"MASTER_PORT": "http"}, "the 2 processes of WORLD_SIZE did not meet at 127.0.0.1:http"),
    ],
)
def test_what_torchrun_would_not_set(
    changes: dict[str, str], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (ALL | changes).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=line):
        processes.meet(torch.device("cpu"))


def test_a_gpu_is_chosen_before_its_processes_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """nccl would guess one, the first for all."""
    called: list[tuple[object, ...]] = []
    for name, value in ALL.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: called.append(("set_device", device)))
    monkeypatch.setattr(
        processes.dist,
        "init_process_group",
        lambda backend, device_id, **_: called.append((backend, device_id)),
    )
    monkeypatch.setattr(processes, "_all_here", lambda: None)
    processes.meet(torch.device("cuda:1"))
    processes.meet(torch.device("cpu"))
    own = torch.device("cuda:1")
    assert called == [("set_device", own), ("nccl", own), ("gloo", None)]


@pytest.mark.parametrize(("number", "rank"), [(signal.SIGTERM, "0"), (signal.SIGINT, "1")])
def test_a_signal_ends_the_wait_for_processes_that_never_come(number: signal.Signals, rank: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    code = (
        "import os, torch\nfrom common import cli\nfrom common.processes import meet\n"
        "def main():\n    os.write(1, b'waits\\n')\n    meet(torch.device('cpu'))\ncli.run_stage(main)\n"
    )
    env = os.environ | ALL | {"RANK": rank, "MASTER_PORT": port}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env, **pipes) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"waits\n"
        time.sleep(1)  # it is in PyTorch's C++ by now
        process.send_signal(number)
        process.wait(timeout=100)
        said = process.stderr.read()
    assert process.returncode == 130
    assert b"interrupted: the same command continues" in said
    assert b"Traceback" not in said

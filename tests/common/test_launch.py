"""common.launch: how a stage in several processes is started, and ends."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousTimeoutError,
)

from common import launch
from common.errors import InputError
from common.layers import driver
from common.nodes import meeting as between
from common.settings import ROOT


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Command lines that torchrun was given; it starts nothing."""
    calls: list[list[str]] = []
    monkeypatch.setattr(launch.run, "main", calls.append)
    monkeypatch.setattr(driver, "launch", None)
    monkeypatch.setattr(launch.logging, "disable", lambda: None)
    return calls


def called(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["launch", *words])
    launch.main()


def test_one_layer_and_a_harvest_start_in_all_processes(
    started: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for words in (["train", "--layer", "3", "--run", "a"], ["harvest", "--layer", "0-2"]):
        called(monkeypatch, "2", *words)
        assert started.pop() == ["--standalone", "--nproc-per-node", "2", "-m", "--", *words]


def test_nodes_meet_at_the_head(started: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The head finds its port free, and torchrun takes it; who starts another command does not meet them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        head = f"localhost:{free.getsockname()[1]}"
    names = set()
    for layer in ("3", "3", "4"):
        called(monkeypatch, "--nodes", "2", "--head", head, "8", "train", "--layer", layer)
        (words,) = started
        started.clear()
        names.add(words.pop(3))
        conf = ["--rdzv-conf", "join_timeout=600,is_host=1"]
        meeting = ["--rdzv-id", "--rdzv-backend", between.KIND, "--rdzv-endpoint", head, *conf]
        assert words == [
            "--nnodes",
            "2",
            *meeting,
            "--nproc-per-node",
            "8",
            "-m",
            "--",
            "train",
            "--layer",
            layer,
        ]
    assert len(names) == 2


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            RendezvousTimeoutError(),
            r"the 2 nodes did not meet at gpu-1:29400 \(RendezvousTimeoutError\); start",
        ),
        (RendezvousClosedError(), "another node has ended or cannot be reached; its output"),
        (RendezvousConnectionError(), "the head gpu-1:29400 has ended or cannot be reached; its output"),
    ],
)
def test_nodes_that_did_not_all_come_or_stay(
    error: Exception, line: str, started: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: list[str]) -> None:
        raise error

    monkeypatch.setattr(launch.run, "main", fails)
    monkeypatch.setattr(launch.Nodes, "_find_head", lambda _: False)
    with pytest.raises(InputError, match=line):
        called(monkeypatch, "--nodes", "2", "--head", "gpu-1:29400", "8", "harvest", "--layer", "3")


def test_processes_start_again_as_often_as_asked(
    started: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    called(monkeypatch, "--max-restarts", "3", "2", "train", "--layer", "3")
    words = ["--nproc-per-node", "2", "-m", "--", "train", "--layer", "3"]
    assert started == [["--standalone", "--max-restarts", "3", *words]]


def failure(code: int, note: Path | None = None, at: float = 0) -> ProcessFailure:
    if note is not None:
        note.write_text(json.dumps({"message": "rank 2 is lost", "timestamp": 0}))
    found = ProcessFailure(0, 1, code, str(note or "none"))
    found.timestamp = int(at)
    return found


@pytest.mark.parametrize(
    ("ended", "code", "line"),
    [
        ({0: (2, False, 0)}, 2, ""),  # it has said why
        ({0: (2, True, 0), 1: (2, True, 0)}, 2, "error: rank 2 is lost\n"),
        ({0: (2, True, 0), 1: (2, False, 0)}, 2, ""),
        ({0: (2, True, 0), 1: (-15, False, 0)}, 2, "error: rank 2 is lost\n"),
        ({0: (2, True, 0), 1: (130, False, 0)}, 2, "error: rank 2 is lost\n"),
        ({0: (2, True, 0), 1: (-9, False, 30)}, 2, "error: rank 2 is lost\n"),  # by torchrun
        (
            {0: (2, True, 1), 1: (-9, False, 0)},
            137,
            "error: rank 1 was killed (SIGKILL); the same command continues\n",
        ),
        ({0: (1, False, 0), 1: (-15, False, 0)}, 1, ""),
        ({0: (-15, False, 0)}, 143, ""),
    ],
)
def test_why_processes_have_ended(
    ended: dict[int, tuple[int, bool, float]],
    code: int,
    line: str,
    tmp_path: Path,
    started: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A line for the node, said by it or here; by rank: exit code, whether it has left a note, when."""
    failures = {
        rank: failure(exitcode, tmp_path / str(rank) if noted else None, at)
        for rank, (exitcode, noted, at) in ended.items()
    }

    def fails(_: list[str]) -> None:
        raise ChildFailedError("train", failures)

    monkeypatch.setattr(launch.run, "main", fails)
    with pytest.raises(SystemExit) as stopped:
        called(monkeypatch, "2", "train", "--layer", "3")
    assert (stopped.value.code, capsys.readouterr().err) == (code, line)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ("99999999999999999999", "train", "--layer", "0"),
            "NPROC: expected a whole number of processes, 1 to 1024",
        ),
        (("2", "tarin", "--layer", "0"), "launch: 'tarin' is no stage; expected harvest or one of train, "),
        (("2", "train.nothing"), "launch: 'train.nothing' is no stage"),
        (("2", "nothing.at.all"), "launch: 'nothing.at.all' is no stage"),
        (("2", ".", "--layer", "0"), "launch: '.' is no stage"),
        (("--nodes", "2", "--head", "http://gpu-1:29400", "2", "train"), "HEAD: expected host:port"),
        (("--nodes", "2", "--head", "[::1:29400", "2", "train"), "HEAD: expected host:port"),
    ],
)
def test_what_can_never_start_is_refused_at_once(
    words: tuple[str, ...], line: str, started: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(line)}"):
        called(monkeypatch, *words)
    assert not started


def test_a_wrong_word_is_told_once_before_anything_starts(
    started: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="unknown option --train\\.lrr"):
        called(monkeypatch, "2", "train", "--layer", "3", "--train.lrr", "1")
    assert not started


def test_a_signal_to_torchrun_is_an_interruption(
    started: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun has passed it on; it was a traceback and exit code 1."""

    def stopped(_: list[str]) -> None:
        raise SignalException("got signal: 15", sigval=15)  # type: ignore[arg-type]

    monkeypatch.setattr(launch.run, "main", stopped)
    with pytest.raises(KeyboardInterrupt):
        called(monkeypatch, "2", "harvest", "--layer", "3")


def test_layers_are_shared_or_follow_each_other(
    started: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with its layer and the set's one run; of a single layer, one process works."""
    asked: list[tuple[dict[int, list[str]], int]] = []
    monkeypatch.setattr(
        driver.spread, "each", lambda commands, places: asked.append((commands, places)) or []
    )
    monkeypatch.setattr("train.finish.line_of", lambda _: {})
    monkeypatch.setattr("transcoder.weights.read_metadata", lambda _: {})
    typed = ["--layer", "0 2", "--train.lr", "1e-3"]
    own = ["--run=default-lr0.001", "--spread=rows"]
    called(monkeypatch, "3", "train", *typed)
    assert asked.pop() == (
        {n: ["common.launch", "3", "train", *typed, f"--layer={n}", *own] for n in (0, 2)},
        1,
    )
    layers = [*typed, "--spread", "layers"]
    called(monkeypatch, "3", "train", *layers)
    assert asked.pop() == ({n: ["train", *layers, f"--layer={n}", *own] for n in (0, 2)}, 3)
    called(monkeypatch, "3", "train", "--layer", "1", "--spread", "layers")
    assert [*asked.pop()[0]] == [1]
    assert not started
    # Without a layer: it was done with none, exit code 0.
    called(monkeypatch, "3", "train", "--spread", "layers")
    assert len(started) == 1
    assert not asked


WAITS = """
import os, pathlib, time
from common.cli import run_stage

def main():
    file = pathlib.Path(os.environ["NOTED"], os.environ["RANK"])
    file.with_suffix(".tmp").write_text(str(os.getpid()))
    file.with_suffix(".tmp").rename(file)
    time.sleep(600)

run_stage(main)
"""


def _runs(process: Path) -> bool:
    """Whether a directory of /proc is that of a process which has not ended."""
    with contextlib.suppress(OSError):
        return (process / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux's kernel")
def test_processes_end_when_their_launcher_is_killed(tmp_path: Path) -> None:
    """Else they would go on, and the same command would be refused until they end."""
    (tmp_path / "waits.py").write_text(WAITS)
    noted = [tmp_path / "0", tmp_path / "1"]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}", "NOTED": f"{tmp_path}"}
    started = subprocess.Popen(
        [sys.executable, "-m", "common.launch", "2", "waits"], cwd=ROOT, env=environment
    )
    ranks: list[Path] = []
    try:
        while not all(file.exists() for file in noted):
            assert started.poll() is None
            time.sleep(0.05)
        ranks = [Path("/proc", file.read_text()) for file in noted]
        started.kill()
        started.wait()
        while any(map(_runs, ranks)):  # pytest's own limit ends this
            time.sleep(0.05)
    finally:
        started.kill()
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(rank.name), signal.SIGKILL)

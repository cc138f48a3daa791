"""What a harvest survives, for real: kill -9 at random instants, a full disk, ranks that come and go."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from common.settings import Settings
from harvest.run import harvest
from shards.commit import read_commit
from shards.remote import LocalFiles
from shards.verify import verify
from tests.disk import small_disk
from tests.harvest.test_run import ROOT, Make, command_of
from tests.models import sentences, write_jsonl

KILLS = 50


@pytest.fixture(scope="module")
def long_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("long") / "long.jsonl", sentences(2500, words=50))


@pytest.fixture
def long_harvest(llama: Path, long_text: Path, settings_for: Make, tmp_path: Path) -> tuple[Settings, Path]:
    """Settings of a harvest of four windows, and the store of an uninterrupted one."""
    options = ("--data.files", str(long_text), "--paths.activations", str(tmp_path / "whole"))
    whole = harvest(settings_for(llama, *options, rows=80_000))[0]
    return settings_for(llama, "--data.files", str(long_text), rows=80_000), whole


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_50_kills_at_random_instants(long_harvest: tuple[Settings, Path]) -> None:
    settings, whole = long_harvest
    path = Path(settings.store_path(1))
    expected = read_commit(whole)
    rng = random.Random(0)
    begun = time.monotonic()
    subprocess.run(command_of(settings), cwd=ROOT, check=True, capture_output=True)
    full = time.monotonic() - begun
    shutil.rmtree(path)
    killed = finished = 0
    while killed < KILLS:
        process = subprocess.Popen(
            command_of(settings), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(timeout=rng.uniform(0.4, 1.0) * full)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
            continue
        assert process.returncode == 0
        assert read_commit(path) == expected
        finished += 1
        shutil.rmtree(path)
    subprocess.run(command_of(settings), cwd=ROOT, check=True, capture_output=True)
    assert read_commit(path) == expected
    assert verify(LocalFiles(path)) == []
    print(f"{killed} kills, {finished + 1} finished stores, all byte-identical")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_any_number_of_processes_writes_the_same_bytes(long_harvest: tuple[Settings, Path]) -> None:
    settings, whole = long_harvest
    path = Path(settings.store_path(1))
    for processes in (2, 3):
        subprocess.run(command_of(settings, processes), cwd=ROOT, check=True, capture_output=True)
        assert read_commit(path) == read_commit(whole)
        shutil.rmtree(path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_20_kills_of_any_rank_at_random_instants(long_harvest: tuple[Settings, Path]) -> None:
    """Both ranks end with it; 2 go on, and 3 at the end, to the bytes of one process."""
    settings, whole = long_harvest
    path = Path(settings.store_path(1))
    expected, rng = read_commit(whole), random.Random(0)
    begun = time.monotonic()
    subprocess.run(command_of(settings, 2), cwd=ROOT, check=True, capture_output=True)
    full = time.monotonic() - begun
    shutil.rmtree(path)
    killed = 0
    while killed < 20:
        command = command_of(settings, 2)
        quiet = subprocess.DEVNULL
        with subprocess.Popen(command, cwd=ROOT, stdout=quiet, stderr=quiet) as launcher:
            try:
                launcher.wait(timeout=rng.uniform(0.4, 1.0) * full)
            except subprocess.TimeoutExpired:
                children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
                if children:
                    with suppress(ProcessLookupError):  # it has ended just now
                        os.kill(int(rng.choice(children)), signal.SIGKILL)
                        killed += 1
                launcher.wait(timeout=120)
        if launcher.returncode == 0:
            assert read_commit(path) == expected
            shutil.rmtree(path)
    subprocess.run(command_of(settings, 3), cwd=ROOT, check=True, capture_output=True)
    assert read_commit(path) == expected
    assert verify(LocalFiles(path)) == []


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_nodes_one_of_which_loses_a_rank(long_harvest: tuple[Settings, Path], tmp_path: Path) -> None:
    """Both end; the same command on both goes on to the same bytes."""
    settings, whole = long_harvest
    path = Path(settings.store_path(1))
    for kills in (True, False):
        with socket.create_server(("127.0.0.1", 0)) as free:
            head = f"localhost:{free.getsockname()[1]}"
        command = [
            sys.executable,
            "-m",
            "common.launch",
            "--nodes",
            "2",
            "--head",
            head,
            "2",
            *command_of(settings)[2:],
        ]
        nodes = []
        for n in range(2):
            with (tmp_path / f"node{n}").open("w") as said:
                nodes.append(subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said))
        deadline = time.monotonic() + 100
        while kills and not list(path.glob(".harvest/records/*.json")) and time.monotonic() < deadline:
            time.sleep(0.01)
        if kills:
            ranks = subprocess.run(
                ["pgrep", "-P", str(nodes[1].pid)], capture_output=True, text=True, check=True
            )
            subprocess.run(["kill", "-9", ranks.stdout.split()[1]], check=True)
        assert [node.wait(timeout=100) for node in nodes] == ([2, 137] if kills else [0, 0])
        said = "".join((tmp_path / f"node{n}").read_text() for n in range(2))
        assert said.count("was killed (SIGKILL); the same command continues") == kills
        assert "Traceback" not in said
    assert read_commit(path) == read_commit(whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_says_how_to_continue(
    llama: Path, long_text: Path, settings_for: Make, number: signal.Signals
) -> None:
    settings = settings_for(llama, "--data.files", str(long_text), rows=80_000)
    path = Path(settings.store_path(1))
    process = subprocess.Popen(
        command_of(settings),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (path / ".harvest/source.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1].startswith("interrupted: ")
    assert errors.splitlines()[-1].endswith("the same command continues")
    assert "Traceback" not in errors


def test_a_full_and_a_read_only_disk(
    llama: Path, long_text: Path, settings_for: Make, tmp_path: Path
) -> None:
    """A real one: a 4 MB tmpfs. The line names the file; with room the same command goes on."""
    with small_disk(tmp_path / "disk", "4m") as (disk, remount):
        settings = settings_for(
            llama, "--data.files", str(long_text), "--paths.activations", str(disk), rows=80_000
        )
        command = [*command_of(settings), "--force"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        last = done.stderr.splitlines()[-1]
        assert "No space left on device" in last
        assert last.endswith("fix that and rerun the same command to continue")
        assert "Traceback" not in done.stderr
        remount("ro")
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert (done.returncode, "Read-only file system; fix that" in done.stderr) == (2, True)
        remount("rw,size=64m")
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        assert verify(LocalFiles(Path(settings.store_path(1)))) == []
        assert not list(disk.rglob("*.tmp"))

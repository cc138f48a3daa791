"""What training survives, or stops at with one line: full and read-only disks, files that vanish, clocks, threads."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tqdm.std

import shards.reader
from common.cli import run_stage
from common.errors import InputError
from common.settings import ROOT, Settings
from shards import Store
from shards.loader import Loader
from tests.disk import small_disk
from tests.fixtures import make_store
from tests.train.runs import sparse_rows
from tests.train.test_runs import assert_same_run
from train.loop import Run, train

Make = Callable[..., Settings]
Capture = pytest.CaptureFixture[str]


def refused(settings: Settings, store: Store, capsys: Capture) -> str:
    """The line with which the stage stops."""
    with pytest.raises(SystemExit) as stopped:
        run_stage(lambda: train(settings, store) and None)
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, happens: Callable[[], object]) -> None:
    feed = Run.feed

    def feeding(self: Run, *args: Any) -> None:
        if self.state.step == step:
            happens()
        feed(self, *args)

    monkeypatch.setattr(Run, "feed", feeding)


@pytest.mark.parametrize("size", ["16k", "48k", "80k", "100k", "182k"])
def test_a_full_disk(
    make_settings: Make, store: Store, finished: Path, size: str, tmp_path: Path, capsys: Capture
) -> None:
    """Full at the first checkpoint, at a later one, or at the weights; nothing half-written stays, and with room it
    goes on.
    """
    with small_disk(tmp_path / "disk", size) as (disk, remount):
        settings = make_settings()
        moved = settings.model_copy(update={"paths": settings.paths.model_copy(update={"checkpoints": disk})})
        line = refused(moved, store, capsys)
        assert line.startswith(f"error: {disk}")
        assert line.endswith("No space left on device; fix that and rerun the same command to continue")
        assert not [path for path in disk.rglob("*") if path.suffix == ".tmp" or path.name == ".lock"]
        remount("size=4m")
        train(moved, store)
        assert_same_run(moved.run_dir(), finished)


def test_a_disk_that_becomes_read_only(
    make_settings: Make,
    store: Store,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    with small_disk(tmp_path / "disk", "4m") as (disk, remount):
        settings = make_settings()
        moved = settings.model_copy(update={"paths": settings.paths.model_copy(update={"checkpoints": disk})})

        def stop() -> None:
            raise InputError("stopped by the test")

        with monkeypatch.context() as patch:
            at_step(patch, 33, stop)
            assert refused(moved, store, capsys) == "error: stopped by the test"
        remount("ro")
        before = {path: path.stat().st_mtime_ns for path in disk.rglob("*")}
        line = refused(moved, store, capsys)
        assert line.endswith("Read-only file system; fix that and rerun the same command to continue")
        assert {path: path.stat().st_mtime_ns for path in disk.rglob("*")} == before
        remount("rw")
        train(moved, store)
        assert_same_run(moved.run_dir(), finished)


def test_a_store_on_a_read_only_disk_is_trained_on(
    make_settings: Make, store: Store, finished: Path, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", "4m") as (disk, remount):
        copy = shutil.copytree(store.path, disk / "layer_0.zarr")
        remount("ro")
        train(make_settings(), Store.open(copy))
        assert_same_run(make_settings().run_dir(), finished)


def test_a_file_that_vanishes_while_training_reads_it(
    make_settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Two files, one kept open: the other is opened anew for every group of chunks."""
    store = make_store(tmp_path / "two.zarr", sparse_rows(40_000, 2), sparse_rows(1024, 3))
    sizes = {"train__batch_size": 1024, "train__rows": 1024 * 120}
    train(make_settings(run="whole", **sizes), store)
    monkeypatch.setattr(shards.reader, "OPEN_FILES", 1)
    file = store.path / "train/inputs/c/1/0"
    settings = make_settings(**sizes)
    with monkeypatch.context() as patch:
        at_step(patch, 45, lambda: file.rename(tmp_path / "away"))
        line = refused(settings, Store.open(store.path), capsys)
    assert line == f"error: {file}: No such file or directory; make verify ARGS=--repair"
    assert (settings.run_dir() / "state" / "latest").read_text() in ("step_60\n", "step_80\n")
    (tmp_path / "away").rename(file)
    train(settings, Store.open(store.path))
    assert_same_run(settings.run_dir(), make_settings(run="whole", **sizes).run_dir())


def test_a_store_that_vanishes_is_mapped_to_the_end(
    make_settings: Make,
    store: Store,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    """All steps are done from the maps; what the samples' text is made of is missed at the very end."""
    copy, settings = shutil.copytree(store.path, tmp_path / "layer_0.zarr"), make_settings()
    with monkeypatch.context() as patch:
        at_step(patch, 50, lambda: copy.rename(tmp_path / "away"))
        line = refused(settings, Store.open(copy), capsys)
    assert line.startswith(f"error: {copy}/train/row_context/c/0: No such file or directory")
    assert (settings.run_dir() / "state" / "latest").read_text() == "step_96\n"
    train(settings, store)
    assert_same_run(settings.run_dir(), finished)


TRUNCATED = """
import mmap, os, sys
from common.cli import run_stage

def stage() -> None:
    with open(sys.argv[1], "r+b") as file:
        mapped = mmap.mmap(file.fileno(), 0)
        os.ftruncate(file.fileno(), 0)
        print(mapped[5000])

run_stage(stage)
"""


def test_what_a_truncated_map_leaves_is_faulthandlers_report(tmp_path: Path) -> None:
    """The moment between looking at the length and reading: the kernel's SIGBUS, and the line it happened at."""
    (tmp_path / "file").write_bytes(bytes(10_000))
    command = [sys.executable, "-c", TRUNCATED, str(tmp_path / "file")]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == -7
    assert "Fatal Python error: Bus error" in process.stderr
    assert "in stage" in process.stderr


def test_a_clock_that_jumps_back(
    make_settings: Make, store: Store, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An hour back at every look, and a timer that stands still: weights and metrics are the same."""
    looks = iter(range(2_000_000_000, 0, -3600))
    for module in (time, tqdm.std):
        monkeypatch.setattr(module, "time", lambda: float(next(looks)))
    monkeypatch.setattr(time, "perf_counter", lambda: 5.0)
    train(make_settings(), store)
    assert_same_run(make_settings().run_dir(), finished)


def test_a_second_training_of_a_run_is_refused(
    make_settings: Make, store: Store, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, said = make_settings(), []

    def second() -> None:
        with pytest.raises(InputError) as stopped:
            train(settings, store)
        said.append(str(stopped.value))

    with monkeypatch.context() as patch:
        at_step(patch, 25, second)
        train(settings, store)
    folder = settings.run_dir()
    expected = f"{folder}: another training is writing it (process {os.getpid()}); wait for it or stop it"
    assert said == [expected]
    assert not (folder / ".lock").exists()
    assert_same_run(folder, finished)


def test_what_a_killed_training_left_is_cleared(make_settings: Make, store: Store, finished: Path) -> None:
    """Its lock, a checkpoint and two files that it was writing."""
    folder = make_settings().run_dir()
    (folder / "state" / ".step_20.tmp").mkdir(parents=True)
    for name in (".lock", "settings.json.77.tmp", "state/.step_20.tmp/state.json", "state/latest.77.tmp"):
        (folder / name).write_text("77\n")
    train(make_settings(), store)
    assert_same_run(folder, finished)
    names = [{str(path.relative_to(root)) for path in root.rglob("*")} for root in (folder, finished)]
    assert names[0] == names[1]


@pytest.mark.parametrize("name", ["_cut", "decode"])
def test_a_loader_thread_that_dies(
    make_settings: Make, store: Store, finished: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """What it raised ends the training, at once; the same command continues."""
    calls, owner = [], Loader if name == "_cut" else shards.reader.MappedArray
    method = "_cut" if name == "_cut" else "chunk"
    works = getattr(owner, method)

    def dies(self: Any, *args: Any, **keywords: Any) -> Any:
        calls.append(0)
        if len(calls) > 30:
            raise MemoryError("no memory for a thread")
        return works(self, *args, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(owner, method, dies)
        with pytest.raises(MemoryError, match="no memory for a thread"):
            train(make_settings(), Store.open(store.path))
    train(make_settings(), store)
    assert_same_run(make_settings().run_dir(), finished)

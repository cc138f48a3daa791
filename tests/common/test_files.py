"""Locks, and folders that appear whole."""

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Timer

import pytest

from common import files
from common.errors import InputError
from common.files import locked, size_of, whole_folder, write_whole
from common.settings import ROOT
from tests.disk import small_disk


def test_holders_that_wait_take_turns(tmp_path: Path) -> None:
    """The file goes with each holder, while the others are between opening it and asking whose it is."""
    lock, inside, seen = tmp_path / "lock", [], []

    def holder(number: int) -> None:
        for _ in range(100):
            with locked(lock, refusal=None):
                inside.append(number)
                seen.append(list(inside))
                inside.remove(number)

    with ThreadPoolExecutor(8) as pool:  # each opens the file anew, as processes do
        list(pool.map(holder, range(8)))
    assert sorted(seen) == [[number] for number in range(8) for _ in range(100)]
    assert list(tmp_path.iterdir()) == []


def test_the_size_of_a_folder_counts_bytes_once(tmp_path: Path) -> None:
    """A second name of a file adds nothing, a link only itself, a half-written file nothing."""
    folder = tmp_path / "folder"
    (folder / "below").mkdir(parents=True)
    (folder / "below/a").write_bytes(b"1234567")
    (folder / "again").hardlink_to(folder / "below/a")
    (tmp_path / "elsewhere").write_bytes(b"x" * 1000)
    (folder / "link").symlink_to("../elsewhere")
    (folder / "b.123.tmp").write_bytes(b"x" * 100)
    assert size_of(folder) == 7 + len("../elsewhere")
    (tmp_path / "moved").symlink_to(folder)
    assert size_of(tmp_path / "moved") == size_of(folder)
    assert size_of(tmp_path / "none") == 0


@pytest.mark.parametrize("below", [".", "a/b"])
def test_a_link_to_a_disk_that_has_gone_is_named(below: str, tmp_path: Path) -> None:
    (tmp_path / "disk").symlink_to("/nowhere/disk")
    folder = tmp_path / "disk" / below
    line = r"disk: a link to /nowhere/disk, which is not there; mount its disk, or remove the link$"
    with pytest.raises(InputError, match=line):
        write_whole(folder / "file", b"x")
    with pytest.raises(InputError, match=line), locked(folder / "lock", "held"):
        pass
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match=r"Not a directory|File exists"):
        write_whole(tmp_path / "file/below", b"x")


def test_a_held_lock_is_refused_with_its_holder(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with locked(lock, "held"):
        holder = lock.read_text().strip()
        with (
            pytest.raises(InputError, match=rf"^held \(process {holder}\); wait for it or stop it$"),
            locked(lock, "held"),
        ):
            pass
        assert lock.is_file()
    assert not lock.exists()


def test_a_holder_that_is_killed_lets_go(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """At once, and the one that waits says for whom."""
    lock = tmp_path / "lock"
    code = "import sys, time; from pathlib import Path; from common.files import locked\n"
    code += f"with locked(Path({str(lock)!r}), None): print(1, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(InputError, match=rf"^held \(process {holder.pid}\)"), locked(lock, "held"):
            pass
        Timer(0.2, holder.kill).start()
        with locked(lock, refusal=None):
            assert lock.read_text() == f"{os.getpid()}\n"
    assert capfd.readouterr().err == f"{lock}: waiting for process {holder.pid}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("refusal", ["held", None])
@pytest.mark.parametrize("missing", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_disk_without_locks(
    missing: int,
    refusal: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is said, and no soft lock is left that a kill would not free."""
    monkeypatch.setattr("fcntl.flock", failing(missing))
    lock = tmp_path / "lock"
    with locked(lock, refusal):
        pass
    assert capsys.readouterr().err == f"{lock}: cannot be locked here; start no second process on it\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [errno.ESTALE, errno.EIO, errno.EPERM])
def test_a_disk_that_fails_to_lock_is_an_error_with_its_place(
    error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fcntl.flock", failing(error))
    with pytest.raises(OSError) as failed, locked(tmp_path / "lock", refusal=None):
        pass
    assert (failed.value.errno, failed.value.filename) == (error, str(tmp_path / "lock"))


def failing(number: int) -> Callable[[int, int], None]:
    """A flock() that this file system does not do."""

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    return flock


def test_a_read_only_disk_is_an_error_with_its_place(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1m") as (disk, remount):
        remount("ro")
        with pytest.raises(OSError, match="Read-only") as failed, locked(disk / "lock", "held"):
            pass
        assert failed.value.filename == str(disk / "lock")


def test_a_full_disk_is_said_of_the_folder(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"No space left.*folder'"), whole_folder(tmp_path / "folder"):
        raise OSError(28, "No space left on device")  # as write() raises it
    assert not list(tmp_path.iterdir())


def test_a_kill_between_two_renames_loses_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    old = tmp_path / ".folder.old.tmp"
    old.mkdir()
    (old / "kept").touch()
    with pytest.raises(OSError, match="no room"), whole_folder(folder):
        raise OSError("no room")
    assert [path.name for path in folder.iterdir()] == ["kept"]
    with whole_folder(folder) as aside:
        (aside / "new").touch()
    assert [path.name for path in folder.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("refused", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
@pytest.mark.parametrize("what", ["directories", "all"])
def test_a_disk_that_cannot_flush(
    refused: int,
    what: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is said once, and what is written is whole."""
    fsync = os.fsync

    def refuses(descriptor: int) -> None:
        if what == "all" or stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(refused, os.strerror(refused))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuses)
    monkeypatch.setattr(files, "_cannot_flush", set())
    write_whole(tmp_path / "file", b"a")
    write_whole(tmp_path / "file", b"b")
    with whole_folder(tmp_path / "folder") as aside:
        write_whole(aside / "within" / "file", b"c")
    assert (tmp_path / "file").read_bytes() + (tmp_path / "folder/within/file").read_bytes() == b"bc"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    said = capsys.readouterr().err
    assert said.endswith("(fsync); what is written survives a kill, perhaps not a power cut\n")
    assert said.count("\n") == 1


def test_a_disk_that_fails_to_flush_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match=r"Input/output error.*file"):
        write_whole(tmp_path / "file", b"a")
    assert list(tmp_path.iterdir()) == []

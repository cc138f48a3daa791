"""Locks, and folders that appear whole."""

import errno
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common import files
from common.errors import InputError
from common.files import locked, whole_folder, write_whole


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

"""Locks, and folders that appear whole."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common.errors import InputError
from common.files import locked, whole_folder


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

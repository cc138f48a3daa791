"""Train rows that were removed after training: what is left is whole and says so, at every instant of the removal."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from common.errors import InputError
from harvest.run import harvest
from shards import Store
from shards.__main__ import _verify
from shards.commit import commit_of, read_commit
from shards.layout import SHARD_ROWS
from shards.plan import TOKEN, measured
from shards.remote import LocalFiles
from shards.verify import LEFT_OVER, repair, verify
from shards.writer import StoreWriter
from tests.fixtures import make_store
from tests.harvest.test_run import Make
from tests.shards.test_store import random_rows

GONE = "its train rows were removed after training .*; harvest them again .make harvest ARGS=--refill"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("removal") / "s.zarr"
    make_store(path, random_rows(SHARD_ROWS + 2000), random_rows(1500, seed=1), storage="int8")
    return path


def test_what_is_left_is_whole_and_the_rest_is_refused_in_a_line(whole: Path, tmp_path: Path) -> None:
    path = shutil.copytree(whole, tmp_path / "s.zarr")
    before, digests = Store.open(path), read_commit(path)
    StoreWriter(path).remove_rows()
    after = Store.open(path)
    assert after.manifest == before.manifest
    assert (after.train.removed, after.heldout.removed, len(after.train)) == (True, False, SHARD_ROWS + 2000)
    for mine, theirs in zip(after.heldout.rows(0, 1500), before.heldout.rows(0, 1500), strict=True):
        assert mine.equal(theirs)
    assert np.array_equal(after.train.contexts[:3], before.train.contexts[:3])
    for asked in (
        lambda: after.train.rows(0, 1),
        lambda: after.train.provenance(0, 1),
        lambda: after.train.loader(64),
    ):
        with pytest.raises(InputError, match=GONE):
            asked()
    commit = commit_of(path)
    assert commit.there | commit.removed == digests
    assert {name.split("/")[1] for name in commit.removed} == {
        *("inputs", "input_scales", "input_row_scales", "input_offsets", "row_context", "row_position"),
        *("outputs", "output_scales", "output_row_scales", "output_offsets"),
    }
    assert verify(LocalFiles(path)) == []
    subprocess.run(["sha256sum", "--quiet", "--strict", "-c", "files.sha256"], cwd=path, check=True)


class Killed(BaseException):
    """kill -9."""


@pytest.mark.parametrize("instant", [0, 1, 2, 9, 19])
def test_a_removal_that_is_killed_at_any_instant(
    whole: Path, tmp_path: Path, instant: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`instant`: after so many renames and removals of files; 20 files go, after one rename."""
    path, left = shutil.copytree(whole, tmp_path / "s.zarr"), [instant]
    unlink, replace = Path.unlink, Path.replace

    def counted(call: object) -> object:
        def made(self: Path, *args: object, **options: object) -> object:
            if path in self.parents and ".harvest" not in self.parts and not left[0]:
                raise Killed
            left[0] -= path in self.parents and ".harvest" not in self.parts
            return call(self, *args, **options)  # type: ignore[operator]

        return made

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", counted(unlink))
        patch.setattr(Path, "replace", counted(replace))
        with pytest.raises(Killed):
            StoreWriter(path).remove_rows()
    for aside in path.glob("*.tmp"):  # written, not renamed
        aside.unlink()
    store = Store.open(path)
    if instant == 0:
        assert verify(LocalFiles(path)) == []
        store.train.rows(0, len(store.train))
    else:
        damages = verify(LocalFiles(path))
        assert damages
        assert {damage.what for damage in damages} == {LEFT_OVER}
        with pytest.raises(InputError, match=GONE):
            store.train.rows(0, 1)
    if instant == 9:
        assert repair(StoreWriter(path), LocalFiles(path), damages) == []
    StoreWriter(path).remove_rows()
    assert Store.open(path).train.removed
    assert verify(LocalFiles(path)) == []


def test_rows_are_harvested_again_on_request_only(
    llama: Path, settings_for: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_for(llama)
    (path,) = harvest(settings)
    digests = read_commit(path)
    StoreWriter(path).remove_rows()
    assert _verify(str(path), settings.paths, repair=False)
    assert "its 2,000 train rows were removed after training" in capsys.readouterr().out
    harvest(settings)
    assert "train rows removed after training; nothing to do (--refill" in "".join(capsys.readouterr())
    assert Store.open(path).train.removed
    harvest(settings, refill=True)
    assert read_commit(path) == digests
    assert commit_of(path).removed == {}
    assert verify(LocalFiles(path)) == []


def test_a_repair_of_what_is_left_leaves_removed_rows_removed(llama: Path, settings_for: Make) -> None:
    settings = settings_for(llama)
    (path,) = harvest(settings)
    StoreWriter(path).remove_rows()
    commit = commit_of(path)
    (path / "heldout/outputs/c/0/0").write_bytes(b"")
    assert repair(StoreWriter(path), LocalFiles(path), verify(LocalFiles(path))) == [("heldout", 0)]
    harvest(settings)
    assert commit_of(path) == commit
    assert verify(LocalFiles(path)) == []


def test_what_a_row_takes_is_measured_on_what_stays(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    make_store(path, random_rows(2000), random_rows(SHARD_ROWS + 2000, seed=1), storage="int8")
    before = measured(path)
    StoreWriter(path).remove_rows()
    assert before is not None
    assert measured(path) == before
    rows = sum(file.stat().st_size for file in path.glob("heldout/[!c]*/c/**/*") if file.is_file())
    assert before == pytest.approx(rows / (SHARD_ROWS + 2000) + TOKEN, rel=0.02)  # less the metadata

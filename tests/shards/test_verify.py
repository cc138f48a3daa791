"""Every damaged byte is found; repair un-commits exactly the damaged windows."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from common.errors import InputError
from harvest.run import harvest
from shards import Store
from shards.commit import read_commit
from shards.layout import SHARD_ROWS
from shards.remote import LocalFiles
from shards.verify import repair, verify
from shards.writer import StoreWriter
from tests.fixtures import make_store
from tests.harvest.test_run import Make
from tests.shards.test_store import cut, flip, random_rows


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("verify") / "s.zarr"
    return make_store(path, random_rows(SHARD_ROWS + 3000), random_rows(1500, seed=1), storage="int8")


def data_files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file() and "/c/" in str(path))


def test_a_whole_store_has_no_damage(store: Store) -> None:
    assert verify(LocalFiles(store.path)) == []


def test_a_flipped_byte_is_named_with_chunk_and_rows(store: Store, tmp_path: Path) -> None:
    copy = shutil.copytree(store.path, tmp_path / "s.zarr")
    path = copy / "train/inputs/c/1/0"
    data = bytearray(path.read_bytes())
    data[len(data) // 4] ^= 1
    path.write_bytes(bytes(data))
    (damage,) = verify(LocalFiles(copy))
    assert (damage.file, damage.array, damage.what) == (
        "train/inputs/c/1/0",
        "train/inputs",
        "checksum mismatch",
    )
    assert damage.lines
    assert damage.chunk is not None
    assert damage.lines.start == SHARD_ROWS + 1024 * damage.chunk
    assert str(damage) == (
        f"train/inputs/c/1/0, chunk {damage.chunk}, train/inputs[{damage.lines.start}:{damage.lines.stop}]: "
        "checksum mismatch"
    )


def read_everything(path: Path) -> None:
    opened = Store.open(path)
    for split in (opened.train, opened.heldout):
        split.rows(0, len(split))
        split.provenance(0, len(split))
        split.contexts[:]


@pytest.mark.parametrize("flips", [60, pytest.param(300, marks=pytest.mark.slow)])
def test_random_flips_are_found_and_never_handed_out(store: Store, tmp_path: Path, flips: int) -> None:
    """One byte flipped at random places over all files, one at a time."""
    copy = shutil.copytree(store.path, tmp_path / "s.zarr")
    rng = np.random.default_rng(flips)
    files = sorted(path for path in copy.rglob("*") if path.is_file())
    sizes = np.array([path.stat().st_size for path in files])
    for _ in range(flips):
        path = (
            files[rng.choice(len(files), p=sizes / sizes.sum())]
            if rng.random() < 0.5
            else files[rng.integers(len(files))]
        )
        original = path.read_bytes()
        data = bytearray(original)
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        path.write_bytes(bytes(data))
        try:
            damaged = [damage.file for damage in verify(LocalFiles(copy))]
        except InputError as error:
            damaged = ["files.sha256"] if "files.sha256" in str(error) else []
        assert str(path.relative_to(copy)) in damaged
        with pytest.raises(InputError):
            read_everything(copy)
        path.write_bytes(original)
    assert verify(LocalFiles(copy)) == []


def test_deleted_emptied_and_truncated_files_of_each_kind(store: Store, tmp_path: Path) -> None:
    kinds = {
        path.relative_to(store.path).parts[1]: path.relative_to(store.path) for path in data_files(store.path)
    }
    assert {
        "contexts",
        "inputs",
        "input_scales",
        "output_row_scales",
        "row_context",
        "row_position",
    } <= kinds.keys()
    for name in [*kinds.values(), Path("tokenizer.json"), Path("zarr.json"), Path("train/inputs/zarr.json")]:
        for damage in (Path.unlink, cut, lambda path: path.write_bytes(b"")):
            copy = shutil.copytree(store.path, tmp_path / "s.zarr")
            damage(copy / name)
            assert str(name) in [each.file for each in verify(LocalFiles(copy))], name
            shutil.rmtree(copy)


def test_files_that_do_not_belong(store: Store, tmp_path: Path) -> None:
    copy = shutil.copytree(store.path, tmp_path / "s.zarr")
    (copy / "train" / "notes.txt").write_text("x")
    damages = verify(LocalFiles(copy))
    line = "train/notes.txt: not listed in files.sha256: no file of the store"
    assert [str(damage) for damage in damages] == [line]
    with pytest.raises(InputError, match=r"notes\.txt: is no file of the store; remove this file"):
        repair(StoreWriter(copy), LocalFiles(copy), damages)
    assert (copy / "files.sha256").is_file()


def test_hidden_files_are_no_part_of_a_store(tmp_path: Path) -> None:
    """File managers, network disks and macOS leave them, while it is written too."""
    path = tmp_path / "s.zarr"
    for name in (".DS_Store", "train/._zarr.json", "train/inputs/c/.nfs0001"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(b"x")
    store = make_store(path, random_rows(100), random_rows(50))
    assert not [name for name in read_commit(path) if "/." in f"/{name}"]
    (path / ".DS_Store").write_bytes(b"another window size")
    assert verify(LocalFiles(path)) == []
    assert len(Store.open(path).train) == len(store.train) == 100


def test_repair_refills_exactly_the_damaged_windows(llama: Path, settings_for: Make) -> None:
    settings = settings_for(llama)
    (path,) = harvest(settings)
    before = read_commit(path)
    untouched = {file: file.stat().st_mtime_ns for file in data_files(path) if "heldout" in str(file)}
    flip(path / "train/outputs/c/0/0")
    (path / "train/row_context/c/0").unlink()
    assert repair(StoreWriter(path), LocalFiles(path), verify(LocalFiles(path))) == [("train", 0)]
    with pytest.raises(InputError, match="unfinished harvest"):
        Store.open(path)
    assert harvest(settings) == [path]
    assert read_commit(path) == before
    assert verify(LocalFiles(path)) == []
    assert untouched == {file: file.stat().st_mtime_ns for file in data_files(path) if "heldout" in str(file)}


def test_what_a_harvest_cannot_refill_is_not_repaired(store: Store, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "train/contexts/c/0/0"):
        copy = shutil.copytree(store.path, tmp_path / "s.zarr")
        flip(copy / name)
        with pytest.raises(
            InputError, match="cannot be refilled from the store alone; remove the store and harvest again"
        ):
            repair(StoreWriter(copy), LocalFiles(copy), verify(LocalFiles(copy)))
        assert (copy / "files.sha256").is_file()
        shutil.rmtree(copy)

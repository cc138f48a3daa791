from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.errors import InputError
from shards import Batch, Store
from shards.layout import CHUNK_ROWS, SHARD_ROWS
from tests.fixtures import make_store
from tests.shards.test_store import STORAGES, random_rows


@pytest.fixture(scope="module", params=STORAGES)
def store(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Store:
    path = tmp_path_factory.mktemp("loader") / "s.zarr"
    return make_store(path, random_rows(2 * SHARD_ROWS + 3500), random_rows(500), storage=request.param)


def batches(store: Store, size: int = 256, **options: Any) -> list[Batch]:
    return list(store.train.loader(size, **options).batches())


def same(a: Batch, b: Batch) -> bool:
    equal = torch.equal(a.inputs, b.inputs) and torch.equal(a.outputs, b.outputs)
    return equal and (a.rows == b.rows).all() and (a.epoch, a.index) == (b.epoch, b.index)


def test_batches_are_the_stored_rows(store: Store) -> None:
    inputs, outputs = store.train.rows(0, len(store.train))
    for batch in batches(store, seed=3):
        assert torch.equal(batch.inputs, inputs[batch.rows])
        assert torch.equal(batch.outputs, outputs[batch.rows])


def test_an_epoch_has_every_row_of_its_chunks_once(store: Store) -> None:
    rows = np.concatenate([batch.rows for batch in batches(store)])
    chunks = len(store.train) // CHUNK_ROWS // 32 * 32
    assert len(np.unique(rows)) == len(rows) == chunks * CHUNK_ROWS
    assert len(np.unique(rows // CHUNK_ROWS)) == chunks


def test_a_batch_mixes_32_chunks(store: Store) -> None:
    assert all(len(np.unique(batch.rows // CHUNK_ROWS)) == 32 for batch in batches(store))


def test_epochs_and_seeds_change_the_order(store: Store) -> None:
    firsts = [batches(store, seed=s, epoch=e)[0].rows for s, e in [(0, 0), (0, 1), (1, 0)]]
    assert not (firsts[0] == firsts[1]).all()
    assert not (firsts[0] == firsts[2]).all()


@pytest.mark.parametrize("start", [1, 100, 127, 128, 129, 255])
def test_resuming_anywhere_gives_the_same_batches(store: Store, start: int) -> None:
    whole = batches(store, epochs=2)
    per_epoch = store.train.loader(256).batches_per_epoch
    resumed = batches(store, epochs=1, epoch=0, batch=start) if start < per_epoch else []
    assert len(resumed) == per_epoch - start
    assert all(same(a, b) for a, b in zip(resumed, whole[start:per_epoch], strict=True))
    again = batches(store, epochs=1, epoch=1, batch=start)
    assert all(same(a, b) for a, b in zip(again, whole[per_epoch + start :], strict=True))


def test_without_a_number_of_epochs_the_loader_never_ends_and_has_no_length(store: Store) -> None:
    loader = store.train.loader(1024, epochs=None)
    stream = loader.batches()
    seen = [next(stream) for _ in range(loader.batches_per_epoch * 2 + 1)]
    stream.close()
    assert [seen[i * loader.batches_per_epoch].epoch for i in range(3)] == [0, 1, 2]
    with pytest.raises(TypeError):
        len(loader)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_are_the_one_process_batch(store: Store, world: int) -> None:
    whole = batches(store)
    ranks = [batches(store, rank=rank, world=world) for rank in range(world)]
    for number, batch in enumerate(whole):
        parts = np.concatenate([rank[number].rows for rank in ranks])
        assert len(parts) == len(batch.rows)
        assert set(parts) == set(batch.rows)
    chunks = [set(np.concatenate([b.rows // CHUNK_ROWS for b in rank])) for rank in ranks]
    assert not set.intersection(*chunks)


@pytest.mark.parametrize(
    ("chunks", "size", "world"), [(7, 84, 2), (7, 84, 3), (40, 1536, 3), (40, 1024, 6), (5, 64, 3), (5, 2, 4)]
)
def test_a_number_of_ranks_that_would_change_the_batches_is_refused(
    tmp_path: Path, chunks: int, size: int, world: int
) -> None:
    """The batch that is advised takes as many chunks for one rank as for all of them."""
    store = make_store(tmp_path / "s.zarr", random_rows(1024 * chunks), random_rows(1))
    alone = store.train.loader(size).group
    try:
        assert store.train.loader(size, world=world).group == alone
        return
    except InputError as error:
        line = str(error)
    assert alone % world
    assert f"which {world} process(es) share; use " in line
    advised = int(line.rpartition(" ")[2])
    assert store.train.loader(advised, world=world).group == store.train.loader(advised).group
    with pytest.raises(InputError, match=f"50 processes cannot share {min(chunks, 32)} chunks of 1024 rows"):
        store.train.loader(size, world=50)


def test_the_length_is_the_number_of_batches_that_are_left(store: Store) -> None:
    loader = store.train.loader(256, batch=5)
    assert len(loader) == len(list(loader)) == loader.batches_per_epoch - 5


@pytest.mark.parametrize(
    ("rows", "size", "group"), [(1024, 64, 1), (5 * 1024 + 3, 96, 4), (7 * 1024, 1000, 5)]
)
def test_small_stores_and_odd_batches(tmp_path: Path, rows: int, size: int, group: int) -> None:
    store = make_store(tmp_path / "s.zarr", random_rows(rows), random_rows(1))
    loader = store.train.loader(size)
    assert loader.group == group
    assert len(loader) == len(list(loader)) > 0


def test_a_split_smaller_than_one_chunk_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.zarr", random_rows(1000), random_rows(1))
    with pytest.raises(
        InputError, match="the split has 1000 rows; a loader needs at least one chunk of 1024"
    ):
        store.train.loader(64)


def test_a_batch_that_cannot_be_cut(store: Store) -> None:
    for size in (40_001, 65_536):
        with pytest.raises(
            InputError, match=rf"train\.batch_size {size}: a batch takes .*; use \d+"
        ) as stopped:
            store.train.loader(size)
        store.train.loader(int(str(stopped.value).rpartition(" ")[2]))


def test_a_broken_thread_raises_in_the_loop(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = store.train.loader(1024)
    stream = loader.batches()
    next(stream)
    monkeypatch.setattr(store.train.readers["outputs"], "chunk", _broken)
    with pytest.raises(ZeroDivisionError):
        list(loader.batches())
    stream.close()


def _broken(number: int, out: np.ndarray | None = None) -> np.ndarray:
    raise ZeroDivisionError

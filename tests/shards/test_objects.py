"""Two harvests write one store at the same time, with different bytes, as on GPUs: one of each window counts."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from common.errors import InputError
from shards.layout import SHARD_ROWS
from shards.objects.scratch import Scratch
from shards.objects.writer import ObjectWriter
from shards.remote import files_of
from shards.store import Store
from shards.verify import verify
from tests.fixtures import begin, filled_window, make_source, make_store
from tests.objects import Bucket, bucket
from tests.shards.test_store import random_rows

WHERE = "s3://bucket/layer_0.zarr"
ROWS = 2 * SHARD_ROWS + 100
TRAIN, HELDOUT = random_rows(ROWS), random_rows(300, seed=1)
OTHER = random_rows(ROWS, seed=2)
SOURCE = make_source(TRAIN[0].shape[1], TRAIN[1].shape[1], ROWS, storage="int8")
"""The rows of the two harvests are of the same text."""


@pytest.fixture
def server() -> Iterator[Bucket]:
    with bucket() as running:
        yield running


@pytest.fixture
def harvests(tmp_path: Path) -> Iterator[Callable[[str], ObjectWriter]]:
    """Harvests that know nothing of each other: none is told that another one is at work."""
    with ExitStack() as stack:

        def make(name: str) -> ObjectWriter:
            writer = ObjectWriter(WHERE, Scratch(tmp_path / name, 10**9))
            stack.enter_context(writer.lock(leads=False))
            return writer

        yield make


def write(writer: ObjectWriter, number: int, rows: tuple, split: str = "train") -> None:
    writer.write_window(split, number, filled_window(SOURCE, split, number, rows), 1.0, 1e9)
    writer.settle()


def committed(server: Bucket) -> dict[str, bytes]:
    return {n: d for n, d in server.below("layer_0.zarr").items() if n[0] != "."}


def test_of_two_harvests_with_other_bytes_one_of_each_window_counts(
    server: Bucket, harvests: Callable[[str], ObjectWriter], tmp_path: Path
) -> None:
    ours, late = harvests("ours"), harvests("late")
    begin(ours, SOURCE, TRAIN, HELDOUT)
    ours.fetch_text()
    late.fetch_text()
    late.begin(SOURCE)
    put, held = late._client.put_whole, []

    def stopped_halfway(name: str, path: Path) -> None:
        if len(held) == 4:
            write(ours, 0, TRAIN)
        held.append(name)
        put(name, path)

    late._client.put_whole = stopped_halfway  # type: ignore[method-assign]
    with pytest.raises(
        InputError, match=r"another harvest is writing it, and was first with .*train-000000\.json"
    ):
        write(late, 0, OTHER)
    late._client.put_whole = put  # type: ignore[method-assign]
    write(late, 1, OTHER)
    with pytest.raises(InputError, match=r"was first with .*train-000001\.json"):
        write(ours, 1, TRAIN)
    assert ours.missing() == [("train", 2), ("heldout", 0)]
    write(ours, 2, TRAIN)
    write(ours, 0, HELDOUT, "heldout")
    ours.finish()
    mixed = tuple(a.copy() for a in TRAIN)
    for side, other in zip(mixed, OTHER, strict=True):
        side[SHARD_ROWS : 2 * SHARD_ROWS] = other[SHARD_ROWS : 2 * SHARD_ROWS]
    expected = make_store(tmp_path / "expected.zarr", mixed, HELDOUT, storage="int8").path
    whole = committed(server)
    assert whole == {name: (expected / name).read_bytes() for name in whole}
    assert verify(files_of(WHERE, tmp_path / "cache", 10**9)) == []

    ours._clean()
    write(late, 2, OTHER)  # a writer that wakes up when all is done decides about nothing
    with pytest.raises(InputError):
        late.finish()
    assert committed(server) == whole
    assert len(Store.open(WHERE, tmp_path / "another").train) == ROWS


def test_two_finish_at_the_same_time(
    server: Bucket, harvests: Callable[[str], ObjectWriter], tmp_path: Path
) -> None:
    """Each file is renamed by one of them, or by both; a finish that was killed is made up for."""
    ours, late = harvests("ours"), harvests("late")
    begin(ours, SOURCE, TRAIN, HELDOUT)
    for writer in (ours, late):
        writer.fetch_text()
    late.begin(SOURCE)
    for number in range(3):
        write(ours, number, TRAIN)
    write(ours, 0, HELDOUT, "heldout")
    place, placed = ours._place, []

    def killed(*move: object) -> None:
        if len(placed) == 9:
            raise KeyboardInterrupt
        placed.append(move)
        place(*move)  # type: ignore[arg-type]

    ours._place = killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        ours.finish()
    assert "files.sha256" not in committed(server)
    late.finish()
    ours._place = place  # type: ignore[method-assign]
    ours.finish()
    expected = make_store(tmp_path / "expected.zarr", TRAIN, HELDOUT, storage="int8").path
    whole = committed(server)
    assert whole == {name: (expected / name).read_bytes() for name in whole}


def test_windows_of_another_harvest_are_not_committed(
    server: Bucket, harvests: Callable[[str], ObjectWriter]
) -> None:
    """A harvest that is begun anew with other settings while a window of the one before it is still on its way."""
    late, ours = harvests("late"), harvests("ours")
    begin(late, SOURCE, TRAIN, HELDOUT)
    late.fetch_text()
    late.begin(SOURCE)
    assert late._begun
    ours.forget()
    other = SOURCE.model_copy(update={"seed": 1})
    begin(ours, other, TRAIN, HELDOUT)
    ours.fetch_text()
    write(late, 0, TRAIN)
    for split, number in ours.missing():
        write(ours, number, HELDOUT if split == "heldout" else TRAIN, split)
    with pytest.raises(InputError, match=r"train-000000\.json: is of a harvest with other text or settings"):
        ours.finish()
    assert "files.sha256" not in committed(server)

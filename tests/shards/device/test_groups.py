"""Batches on a device that is no CPU: the CPU's, and few copies."""

from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from shards import Batch, Store, loader
from shards.layout import CHUNK_ROWS, SHARD_ROWS
from shards.loader import DeviceGroup, Loader
from tests.fixtures import make_store
from tests.pretend import DEVICE, Pretend, pretend_device
from tests.shards.device.late import LateCopies, LateMark
from tests.shards.test_store import STORAGES, random_rows


@pytest.fixture(scope="module", params=STORAGES)
def store(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Store:
    """Three groups and a bit."""
    path = tmp_path_factory.mktemp("groups") / "s.zarr"
    return make_store(path, random_rows(3 * SHARD_ROWS + 3500), random_rows(9), storage=request.param)


def batches(store: Store, device: torch.device | str, **options: Any) -> list[Batch]:
    return list(store.train.loader(2048, device=device, **options).batches())


def check_same(there: list[Batch], here: list[Batch]) -> None:
    assert len(there) == len(here) > 0
    for a, b in zip(there, here, strict=True):
        assert isinstance(a.inputs, Pretend)
        assert isinstance(a.outputs, Pretend)
        assert a.inputs.inner.dtype == torch.float32
        assert torch.equal(a.inputs.inner, b.inputs)
        assert torch.equal(a.outputs.inner, b.outputs)
        assert (a.rows == b.rows).all()
        assert (a.epoch, a.index) == (b.epoch, b.index)


@pytest.mark.parametrize(
    "options",
    [{"epochs": 2, "seed": 3}, {"epoch": 1, "batch": 17}, {"batch": 16}, {"rank": 1, "world": 2}],
    ids=["two epochs", "from the middle", "from a group's start", "second of two ranks"],
)
def test_a_device_gets_the_cpus_batches(
    store: Store, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where every copy is as late as it may be; the batches are compared after the last one."""
    here = batches(store, "cpu", **options)
    with pretend_device():
        check_same(batches(store, DEVICE, **options), here)
        monkeypatch.setattr(loader, "Copies", LateCopies)
        check_same(batches(store, DEVICE, **options), here)


def test_a_group_is_copied_once_as_it_is_stored(store: Store) -> None:
    split = store.train
    bytes_of_rows = split.storage.dtype.itemsize * (split.d_in + split.d_out)
    of_scales = 2 * 4 * (split.d_in + split.d_out) + 2 * 4 * CHUNK_ROWS if split.storage.scaled else 0
    with pretend_device() as counts:
        groups = len(batches(store, DEVICE)) // split.loader(2048).batches_per_group
        assert groups == 3
        assert counts["copies to device"] == groups * (8 if split.storage.scaled else 2)
        assert counts["bytes to device"] == groups * 32 * (CHUNK_ROWS * bytes_of_rows + of_scales)
        assert counts["copies to host"] == counts["waits"] == 0


def test_a_batch_is_three_kernels_a_side(store: Store) -> None:
    with pretend_device() as counts:
        stream = store.train.loader(2048, device=DEVICE, epochs=None).batches()
        next(stream)
        before = counts["kernels"] - counts["copies to device"]
        for _ in range(100):
            next(stream)
        after = counts["kernels"] - counts["copies to device"]
        stream.close()
    assert after - before == 100 * (6 if store.train.storage.scaled else 2)


def test_a_group_may_be_overwritten_only_once_its_batches_are_cut(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy into a group's memory waits for a mark that was set after the last batch of it."""
    events: list[tuple[str, object]] = []
    values = DeviceGroup.values

    class Noted(LateCopies):
        def mark(self) -> Any:
            mark = super().mark()
            events.append(("mark", mark))
            return mark

        def start(self, pairs: Any, after: Any) -> Any:
            pairs = list(pairs)
            events.append(("start", (id(pairs[0][0]), after)))
            return super().start(pairs, after)

    def noted(self: DeviceGroup, side: str, rows: slice) -> torch.Tensor:
        events.append(("cut", id(next(iter(self._there.values())))))
        return values(self, side, rows)

    monkeypatch.setattr(loader, "Copies", Noted)
    monkeypatch.setattr(DeviceGroup, "values", noted)
    with pretend_device():
        batches(store, DEVICE, epochs=2)
    starts = [(place, *what) for place, (kind, what) in enumerate(events) if kind == "start"]  # type: ignore[misc]
    assert len(starts) == 6
    for place, memory, after in starts:
        marked = next(i for i, (kind, what) in enumerate(events) if kind == "mark" and what is after)
        cut = [i for i, (kind, what) in enumerate(events[:place]) if kind == "cut" and what == memory]
        assert not cut or cut[-1] < marked


def test_a_broken_thread_raises_when_its_group_is_wanted(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole: Loader = store.train.loader(2048, device=DEVICE)
    reader, chunk = store.train.readers["outputs"], store.train.readers["outputs"].chunk
    second = next(islice(whole._schedule(), 1, None)).chunks

    def broken(number: int, out: np.ndarray | None = None) -> np.ndarray:
        if number in second:
            raise ZeroDivisionError
        return chunk(number, out)

    monkeypatch.setattr(reader, "chunk", broken)
    got = 0
    with pretend_device(), pytest.raises(ZeroDivisionError):  # noqa: PT012
        for _ in whole.batches():
            got += 1
    assert got == whole.batches_per_group


class HostMark(LateMark):
    """Knows whether a thread of the host has waited for it, or only what the device computes."""

    by_host = False

    def wait(self) -> None:
        self.by_host = True
        super().wait()


class HostCopies(LateCopies):
    def start(self, pairs: Any, after: Any) -> HostMark:
        pairs = list(pairs)
        return HostMark(lambda: [to.copy_(source) for to, source in pairs])

    def compute_after(self, mark: Any) -> None:
        LateMark.wait(mark)


def test_memory_is_written_again_or_given_back_only_once_it_was_copied(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host may be far ahead of the device: that batches were asked for of a copy does not say that it is made."""
    decode, settle, waited = loader._Group.decode, DeviceGroup.settle, []
    settled: list[Any] = []

    def decodes(self: DeviceGroup, *rest: Any) -> None:
        if isinstance(self._copied, HostMark):
            waited.append(self._copied.by_host)
        decode(self, *rest)

    def settles(self: DeviceGroup) -> None:
        settle(self)
        settled.append(self._copied)

    monkeypatch.setattr(loader, "Copies", HostCopies)
    monkeypatch.setattr(loader._Group, "decode", decodes)
    monkeypatch.setattr(DeviceGroup, "settle", settles)
    with pretend_device():
        stream = store.train.loader(2048, device=DEVICE, epochs=None).batches()
        for _ in range(5 * 16 + 3):
            next(stream)
        stream.close()
    assert waited == [True] * 5
    assert [mark.by_host for mark in settled] == [True, True]

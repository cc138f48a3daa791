"""A store in an object store: moto's S3 server and a plain HTTP server, both started here on loopback."""

import contextlib
import itertools
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import InputError
from shards import Store
from shards.commit import read_commit
from shards.layout import COMMIT, SHARD_ROWS
from shards.objects.ahead import Turn, fetching
from shards.objects.client import AT_ONCE, TRIES, Client
from shards.objects.pieces import StreamedArray, in_pieces
from shards.remote import as_they_are, files_of, upload
from shards.store import read_tokenizer
from shards.verify import verify
from tests import objects
from tests.fixtures import make_store
from tests.objects import moto_bucket, now_and_then, quick
from tests.shards.test_store import random_rows

LIMIT = 10**9


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("remote") / "layer_0.zarr"
    return make_store(path, random_rows(2 * SHARD_ROWS + 2000), random_rows(1100, seed=1), storage="int8")


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with moto_bucket() as address:
        yield address


@pytest.fixture(params=["all requests"])
def web(store: Store, request: pytest.FixtureRequest) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

        def do_HEAD(self) -> None:
            if request.param == "all requests":
                super().do_HEAD()
            else:
                self.send_error(405)

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=store.path))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def same_rows(a: Store, b: Store) -> bool:
    splits = [(a.train, b.train), (a.heldout, b.heldout)]
    return all(
        torch.equal(x, y)
        for s, t in splits
        for x, y in zip(s.rows(0, len(s)), t.rows(0, len(t)), strict=True)
    )


def same_batches(remote: Store, store: Store, **options: int) -> bool:
    ours, theirs = (each.train.loader(512, seed=1, **options).batches() for each in (store, remote))
    return all(
        (a.rows == b.rows).all() and torch.equal(a.inputs, b.inputs) and torch.equal(a.outputs, b.outputs)
        for a, b in zip(ours, theirs, strict=True)
    )


def test_uploaded_and_read_back(store: Store, bucket: str, tmp_path: Path) -> None:
    url = f"{bucket}/layer_0.zarr"
    upload(store.path, url)
    remote = Store.open(url, tmp_path, LIMIT)
    assert remote.manifest == store.manifest
    assert same_rows(remote, store)
    assert same_batches(remote, store)
    assert verify(files_of(url, tmp_path, LIMIT)) == []


def test_a_web_server_that_gives_no_parts(store: Store, web: str, tmp_path: Path) -> None:
    """A part is cut from the whole: another thread may just be writing the file to the cache, which has holes then."""
    client, data = Client(web), (store.path / "train/inputs/c/0/0").read_bytes()
    assert client.piece("train/inputs/c/0/0", 10, 500) == data[10:500]
    assert client.end("train/inputs/c/0/0", 100) == (data, len(data))
    assert client.piece("train/nothing", 0, 1) is None


@pytest.mark.parametrize("web", ["all requests", "no HEAD"], indirect=True)
def test_a_store_read_over_http_has_the_same_rows(store: Store, web: str, tmp_path: Path) -> None:
    remote = Store.open(web, tmp_path, LIMIT)
    assert same_rows(remote, store)
    assert same_batches(remote, store)  # Python's server does not give parts of files


def test_the_cache_stays_below_its_limit(store: Store, web: str, tmp_path: Path) -> None:
    limit = 300_000
    remote = Store.open(web, tmp_path, limit)
    for start in range(0, len(store.train) - 5000, 5000):
        part, whole = remote.train.rows(start, start + 5000), store.train.rows(start, start + 5000)
        assert torch.equal(part[0], whole[0])
        assert torch.equal(part[1], whole[1])
        cached = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
        largest = max(path.stat().st_size for path in store.path.rglob("*") if path.is_file())
        assert cached <= limit + largest


def test_what_is_cached_is_not_fetched_again(store: Store, web: str, tmp_path: Path) -> None:
    remote = Store.open(web, tmp_path, LIMIT)
    remote.train.rows(0, len(remote.train))
    hidden = store.path.with_name("hidden")
    (store.path / "train").rename(hidden)
    try:
        again = Store.open(web, tmp_path, LIMIT)
        assert np.isfinite(again.train.rows(0, 1000)[0].numpy()).all()
    finally:
        hidden.rename(store.path / "train")


def test_damage_in_the_cache_is_found(store: Store, web: str, tmp_path: Path) -> None:
    remote = Store.open(web, tmp_path, LIMIT)
    remote.train.rows(0, 10)
    cached = next(tmp_path.rglob("train/inputs/c/0/0"))
    data = bytearray(cached.read_bytes())
    data[100] ^= 1
    cached.write_bytes(bytes(data))
    with pytest.raises(InputError, match="checksum mismatch"):
        Store.open(web, tmp_path, LIMIT).train.rows(0, SHARD_ROWS)


def test_another_store_in_its_place_empties_the_cache(store: Store, web: str, tmp_path: Path) -> None:
    files = files_of(web, tmp_path, LIMIT)
    files.local("tokenizer.json")
    (files.root / "files.sha256").write_text("another\n")
    files = files_of(web, tmp_path, LIMIT)
    assert not (files.root / "tokenizer.json").exists()
    assert read_commit(files.root) == read_commit(store.path)


def test_an_upload_is_complete_or_no_store(
    store: Store, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import obstore

    put = obstore.put

    def fails_late(target: object, name: str, data: object, **_: object) -> object:
        if name == "train/outputs/c/2/0":
            raise OSError("connection lost")
        return put(target, name, data)  # type: ignore[arg-type]

    monkeypatch.setattr(obstore, "put", fails_late)
    url = f"{bucket}/half.zarr"
    with pytest.raises(InputError, match="train/outputs/c/2/0: cannot be written: connection lost"):
        upload(store.path, url)
    with pytest.raises(InputError, match=r"no complete store there \(files\.sha256 is missing\)"):
        Store.open(url, tmp_path, LIMIT)


@pytest.mark.parametrize("url", ["s3://rows/nothing.zarr", "http://127.0.0.1:9/x"])
def test_addresses_without_a_store(url: str, bucket: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"files\.sha256: (no complete store there|cannot be read)"):
        Store.open(url, tmp_path, LIMIT)


@pytest.mark.parametrize(("mark", "code"), [("#", "%23"), ("?", "%3F")])
def test_an_address_ends_where_its_name_does(mark: str, code: str, store: Store, tmp_path: Path) -> None:
    """What follows these marks is no part of a name: every store would be put into the same place."""
    there = f"file://{tmp_path}/runs{mark}2/s.zarr"
    with pytest.raises(InputError, match=re.escape(f"an address must not contain {mark}; write {code}")):
        upload(store.path, there)
    upload(store.path, there.replace(mark, code))
    assert (tmp_path / f"runs{mark}2" / "s.zarr" / COMMIT).is_file()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("folder", ["a b", "ü", "a+b", "a%20b"])
def test_odd_names_of_folders(folder: str, store: Store, tmp_path: Path) -> None:
    with objects.bucket():
        upload(store.path, f"s3://bucket/{folder}/s.zarr")
        assert verify(as_they_are(f"s3://bucket/{folder}/s.zarr", tmp_path, LIMIT)) == []
        assert same_rows(Store.open(f"s3://bucket/{folder}/s.zarr", tmp_path / "cache", LIMIT), store)


def test_a_damaged_list_of_files_is_named_where_it_is(store: Store, tmp_path: Path) -> None:
    """Not in the cache: what `verify` keeps there is gone when the line is read."""
    with objects.bucket() as server:
        upload(store.path, "s3://bucket/s.zarr")
        server.objects[f"s.zarr/{COMMIT}"] = b""
        for opened in (files_of, as_they_are):
            with pytest.raises(
                InputError, match=r"^s3://bucket/s\.zarr/files\.sha256: damaged: .* harvest again$"
            ):
                opened("s3://bucket/s.zarr", tmp_path / opened.__name__, LIMIT)


FAULTS = {
    "throttled": now_and_then(0.2, "429", "503", "reset"),
    "cut": now_and_then(0.2, "cut"),
    "half, as if it were whole": now_and_then(0.1, "half", only="GET"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("limit", [LIMIT, 400_000])
def test_batches_from_an_object_store_that_fails_now_and_then(
    fault: str, limit: int, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two epochs, also where the cache holds less than one. Each chunk is asked for once where it holds all."""
    quick(monkeypatch)
    with objects.bucket() as server:
        upload(store.path, "s3://bucket/s.zarr")
        server.fault, server.asked = FAULTS[fault], Counter()
        remote = Store.open("s3://bucket/s.zarr", tmp_path, limit)
        assert same_batches(remote, store, epochs=2)
        cached = sum(path.stat().st_blocks * 512 for path in tmp_path.rglob("*") if path.is_file())
        assert cached <= limit + 200_000
        if limit == LIMIT:
            chunks, arrays, files = len(store.train) // 1024, 8, 3
            assert server.asked["GET"] < 1.6 * (chunks * arrays + files * arrays + 40)


def test_what_has_gone_from_a_small_cache_is_fetched_again(store: Store, tmp_path: Path) -> None:
    """The tokenizer too, which is read when a training ends, with all rows read since."""
    with objects.bucket():
        upload(store.path, "s3://bucket/s.zarr")
        remote = Store.open("s3://bucket/s.zarr", tmp_path, 400_000)
        first = remote.tokenizer_path
        assert same_batches(remote, store)
        assert not first.is_file()
        assert read_tokenizer(remote.tokenizer_path).to_str() == read_tokenizer(store.tokenizer_path).to_str()


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store of the same text that was harvested with other values."""
    path = tmp_path_factory.mktemp("other") / "layer_0.zarr"
    rows = random_rows(2 * SHARD_ROWS + 2000, seed=3), random_rows(1100, seed=4)
    return make_store(path, *rows, storage="int8")


@pytest.mark.parametrize("then", ["another", "removed", "the same"])
def test_rows_of_two_stores_are_never_mixed(then: str, store: Store, other: Store, tmp_path: Path) -> None:
    """A chunk is read, then what is at the address changes, then one of the next file is read."""
    with objects.bucket() as server:
        upload(store.path, "s3://bucket/s.zarr")
        remote = Store.open("s3://bucket/s.zarr", tmp_path, LIMIT)
        reader = in_pieces(remote.train.readers["inputs"])
        reader.chunk(0)
        server.objects.clear()
        if then != "removed":
            upload((other if then == "another" else store).path, "s3://bucket/s.zarr")
        if then == "the same":
            assert np.array_equal(reader.chunk(33), store.train.readers["inputs"].chunk(33))
            return
        line = "another store has taken its place" if then == "another" else "no complete store there"
        with pytest.raises(InputError, match=rf"^s3://bucket/s\.zarr.*: {line}"):
            reader.chunk(33)


def test_an_upload_in_the_place_of_another_store_is_none_until_it_is_whole(
    store: Store, other: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch)
    with objects.bucket() as server:
        upload(store.path, "s3://bucket/s.zarr")
        server.fault = lambda method, name: "400" if method == "PUT" and "outputs/c/2" in name else None
        with pytest.raises(InputError, match="outputs/c/2/0: cannot be written"):
            upload(other.path, "s3://bucket/s.zarr")
        with pytest.raises(InputError, match="no complete store there"):
            Store.open("s3://bucket/s.zarr", tmp_path, LIMIT)
        server.fault = lambda *_: None
        upload(other.path, "s3://bucket/s.zarr")
        assert same_rows(Store.open("s3://bucket/s.zarr", tmp_path, LIMIT), other)


def test_after_a_failure_nothing_more_is_fetched() -> None:
    """Where a server does not answer, each further chunk would be waited for a minute."""
    begun, all_under_way = [], threading.Barrier(AT_ONCE, timeout=60)

    class Fails(StreamedArray):
        def __init__(self) -> None: ...

        def fetch(self, number: int) -> None:
            begun.append(number)
            if len(begun) <= AT_ONCE:
                all_under_way.wait()
            raise InputError("no answer")

    turns = (Turn(0, group, 0, np.arange(32)) for group in range(4))
    with fetching({"inputs": Fails()}) as fetched:
        first = next(fetched(turns))
        said = {str(fetch.exception()) for fetch in itertools.chain(*first.fetches)}
    assert said == {"no answer"}
    assert len(begun) == AT_ONCE


def test_half_a_file_is_never_taken_for_whole(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch)
    with objects.bucket() as server:
        upload(store.path, "s3://bucket/s.zarr")
        remote = Store.open("s3://bucket/s.zarr", tmp_path, LIMIT)
        server.fault = lambda method, name: "half" if method == "GET" and "inputs" in name else None
        with pytest.raises(
            InputError, match=r"s3://bucket/s\.zarr/train/inputs/c/0/0: sha256 expected .* \(\d+ bytes\)"
        ):
            remote.train.rows(0, 10)
        with pytest.raises(InputError, match=r"s3://bucket/s\.zarr/train/inputs/c/\d/0: "):
            next(iter(remote.train.loader(512)))
        server.fault = lambda *_: None
        assert same_rows(remote, store)
        assert same_batches(remote, store)
        server.fault = lambda *_: "503"
        with pytest.raises(InputError, match=r"s3://bucket/s\.zarr/files\.sha256: cannot be read: .*503"):
            Store.open("s3://bucket/s.zarr", tmp_path / "another", LIMIT)


@pytest.mark.parametrize("halves", range(TRIES + 1))
def test_what_arrives_by_halves_is_asked_for_again(halves: int, store: Store, tmp_path: Path) -> None:
    """As often as TRIES: an object that is written, a file, and the list of a store's files, which no list names."""
    with objects.bucket() as server:
        upload(store.path, "s3://bucket/s.zarr")
        client, file = Client("s3://bucket/a"), tmp_path / "file"
        file.write_bytes(b"0123456789")
        cases: list[tuple[str, str, Callable[[], object]]] = [
            ("PUT", "record", lambda: client.create("record", b"0123456789")),
            ("PUT", "part", lambda: client.put_whole("part", file)),
            ("GET", COMMIT, lambda: Store.open("s3://bucket/s.zarr", tmp_path / "cache", LIMIT)),
        ]
        for kind, of, what in cases:
            server.fault = halved(kind, of, halves)
            with (
                pytest.raises(InputError, match=r"are stored; run the same command again|damaged")
                if halves == TRIES
                else contextlib.nullcontext()
            ):
                what()
                assert server.objects.get(f"a/{of}", b"0123456789") == b"0123456789"


def halved(kind: str, name: str, times: int) -> objects.Fault:
    """The first `times` requests of this kind for objects of this name."""
    turns = itertools.count()
    return lambda method, of: "half" if method == kind and of.endswith(name) and next(turns) < times else None

"""A store in an object store: moto's S3 server and a plain HTTP server, both started here on loopback."""

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import InputError
from shards import Store
from shards.commit import read_commit
from shards.layout import SHARD_ROWS
from shards.remote import files_of, upload
from shards.verify import verify
from tests.fixtures import make_store
from tests.shards.test_store import random_rows

LIMIT = 10**9


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("remote") / "layer_0.zarr"
    return make_store(path, random_rows(2 * SHARD_ROWS + 2000), random_rows(1100, seed=1), storage="int8")


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        import urllib.request

        request = urllib.request.Request(f"http://{host}:{port}/rows", method="PUT")
        urllib.request.urlopen(request).close()
        yield "s3://rows/activations"
    server.stop()


@pytest.fixture
def web(store: Store) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

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


def test_uploaded_and_read_back(store: Store, bucket: str, tmp_path: Path) -> None:
    url = f"{bucket}/layer_0.zarr"
    upload(store.path, url)
    remote = Store.open(url, tmp_path, LIMIT)
    assert remote.manifest == store.manifest
    assert same_rows(remote, store)
    ours, theirs = store.train.loader(512, seed=1).batches(), remote.train.loader(512, seed=1).batches()
    for a, b in zip(ours, theirs, strict=True):
        assert (a.rows == b.rows).all()
        assert torch.equal(a.inputs, b.inputs)
    assert verify(files_of(url, tmp_path, LIMIT)) == []


def test_a_store_read_over_http_has_the_same_rows(store: Store, web: str, tmp_path: Path) -> None:
    assert same_rows(Store.open(web, tmp_path, LIMIT), store)


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

    def fails_late(target: object, name: str, data: object) -> object:
        if name == "train/outputs/c/2/0":
            raise OSError("connection lost")
        return put(target, name, data)  # type: ignore[arg-type]

    monkeypatch.setattr(obstore, "put", fails_late)
    url = f"{bucket}/half.zarr"
    with pytest.raises(InputError, match="upload failed: connection lost"):
        upload(store.path, url)
    with pytest.raises(InputError, match=r"no complete store there \(files\.sha256 is missing\)"):
        Store.open(url, tmp_path, LIMIT)


@pytest.mark.parametrize("url", ["s3://rows/nothing.zarr", "http://127.0.0.1:9/x"])
def test_addresses_without_a_store(url: str, bucket: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"files\.sha256: (no complete store there|cannot be read)"):
        Store.open(url, tmp_path, LIMIT)

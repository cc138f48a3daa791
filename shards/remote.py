"""Stores at s3://, gs://, https:// and hf:// addresses, read through a local cache directory; and uploading one.

hf:// is common/hub.py's. Credentials and endpoints of the others come from the environment, by the names obstore
documents (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, GOOGLE_SERVICE_ACCOUNT, ...).
"""

import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from common import hub
from common.errors import InputError, first_line
from common.files import inside, read_commit, write_whole
from common.progress import progress
from common.settings import Paths
from shards.layout import COMMIT

SCHEMES = ("s3://", "gs://", "https://", "http://", hub.SCHEME)
CACHE = Paths().cache
CACHE_BYTES = Paths().cache_bytes


def is_url(where: str | Path) -> bool:
    """Whether `where` is an address, of a kind that stores are read from."""
    return str(where).startswith(SCHEMES)


class Files(Protocol):
    """Where a store's files are: a local directory, or a cache of a remote one."""

    where: str
    root: Path
    """Local directory that the files are below, once `local` has named them."""

    def local(self, name: str) -> Path:
        """A local path of file `name`; raises `InputError` when it cannot be had."""
        ...


class LocalFiles:
    """The files of a store in a local directory."""

    def __init__(self, root: Path) -> None:
        self.root, self.where = root, str(root)

    def local(self, name: str) -> Path:
        return inside(self.root, name)


class RemoteFiles:
    """Downloads whole files on demand into `cache`, least recently used ones go above `limit` bytes.

    A file appears whole in the cache; its chunks are verified as any other's when they are read.
    """

    def __init__(self, url: str, cache: Path, limit: int) -> None:
        self.where = url.rstrip("/")
        self._store = _open(self.where)
        self.root = cache / hashlib.sha256(self.where.encode()).hexdigest()[:16]
        self._limit = limit
        self._lock = threading.Lock()
        self._busy: dict[str, threading.Lock] = {}

    def local(self, name: str) -> Path:
        with self._lock:
            busy = self._busy.setdefault(name, threading.Lock())
        path = inside(self.root, name)
        with busy:
            if path.is_file():
                os.utime(path)
            else:
                write_whole(path, _get(self._store, name, self.where))
                self._evict(path)
        return path

    def _evict(self, newest: Path) -> None:
        """Remove what was used longest ago; a mapped file stays readable until it is let go."""
        with self._lock:
            files = [path for path in self.root.rglob("*") if path.is_file() and path.suffix != ".tmp"]
            stats = sorted((path.stat().st_mtime_ns, path.stat().st_size, path) for path in files)
            total = sum(size for _, size, _ in stats)
            for _, size, path in stats:
                if total <= self._limit:
                    return
                if path not in (newest, self.root / COMMIT):
                    path.unlink()
                    total -= size


def files_of(where: str | Path, cache: Path, cache_bytes: int) -> Files:
    """Local or remote files of the store at `where`.

    A remote commit is fetched anew: another store may have taken its place since it was cached.
    """
    if not is_url(where):
        return LocalFiles(Path(where))
    if hub.is_hub(where):
        return hub.HubFiles(str(where))
    files = RemoteFiles(str(where), cache, cache_bytes)
    commit = _get(files._store, COMMIT, files.where)
    cached = files.root / COMMIT
    if cached.is_file() and cached.read_bytes() != commit:
        for path in files.root.rglob("*"):
            if path.is_file():
                path.unlink()
    write_whole(cached, commit)
    return files


def upload(root: Path, url: str) -> None:
    """Copy the complete store at `root` to `url`; `files.sha256` last, so that it is never half there."""
    names = sorted(read_commit(root))
    if hub.is_hub(url):
        hub.upload(root, url, f"Activation store {root.name}", [*names, COMMIT])
        return
    target = _open(url)

    def put(name: str) -> int:
        import obstore

        try:
            obstore.put(target, name, root / name)
        except Exception as error:  # obstore raises one class per provider
            raise InputError(f"{url}/{name}: upload failed: {first_line(error)[:200]}") from error
        return (root / name).stat().st_size

    total = sum((root / name).stat().st_size for name in names)
    with (
        ThreadPoolExecutor(8) as pool,
        progress("upload", total, "B") as bar,
    ):
        for size in pool.map(put, names):
            bar.update(size)
        put(COMMIT)


def _open(url: str) -> Any:
    from obstore.store import from_url

    endpoint = os.environ.get("AWS_ENDPOINT_URL", "") if url.startswith("s3://") else url
    try:
        if endpoint.startswith("http://"):
            return from_url(url, client_options={"allow_http": True})  # pyright: ignore
        return from_url(url)
    except Exception as error:  # obstore raises one class per provider
        raise InputError(f"{url}: not an address of an object store: {first_line(error)[:200]}") from error


def _get(store: Any, name: str, where: str) -> bytes:
    import obstore

    try:
        return bytes(obstore.get(store, name).bytes())
    except FileNotFoundError:
        what = "no complete store there (files.sha256 is missing)" if name == COMMIT else "missing"
        raise InputError(f"{where}/{name}: {what}") from None
    except Exception as error:  # obstore raises one class per provider
        raise InputError(f"{where}/{name}: cannot be read: {first_line(error)[:200]}") from error

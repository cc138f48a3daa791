"""Stores at s3://, gs://, az://, file://, https:// and hf:// addresses, read through a local cache; and uploading one.

hf:// is common/hub.py's, the others are objects/client.py's.
"""

import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from common import hub
from common.errors import InputError, shown
from common.files import inside, write_whole
from common.progress import progress
from common.settings import Paths
from shards.commit import commit_in, digests_itself, read_commit, store_files
from shards.layout import COMMIT
from shards.objects.client import SCHEMES as OBJECT_STORES
from shards.objects.client import TRIES, Client, missing

SCHEMES = (*OBJECT_STORES, hub.SCHEME)
CACHE = Paths().cache
CACHE_BYTES = Paths().cache_bytes
SLACK = 16
"""A cache is measured anew whenever a sixteenth of it came, and when it is full, a sixteenth of it goes."""


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
    """Downloads whole files on demand into `root`, least recently used ones go above `limit` bytes.

    A file appears whole in the cache, with the digest that the commit has of it; its chunks are verified as any other's
    when they are read.
    """

    def __init__(self, client: Client, root: Path, limit: int) -> None:
        self.client, self.where, self.root = client, client.url, root
        self.pieces = root.with_name(f"{root.name}.pieces")
        """Where files are of which only parts are there (objects/pieces.py)."""
        self.ends: dict[str, tuple[bytes, int]] = {}
        """Index and size of these, as far as they were asked for: 0.5 kB each."""
        self._limit = limit
        self._lock = threading.Lock()
        self._busy: dict[str, threading.Lock] = {}
        self._commit: tuple[tuple[object, ...] | None, bytes] | None = None
        self._digests: dict[str, str] | None = None
        self._measured: int | None = None
        self._since = 0

    def local(self, name: str) -> Path:
        with self._lock:
            busy = self._busy.setdefault(name, threading.Lock())
        path = inside(self.root, name)
        with busy:
            if path.is_file():
                os.utime(path)
            else:
                data = self._download(name)
                write_whole(path, data)
                self.came(len(data), path)
        return path

    def fix(self) -> bytes:
        """The commit, which `refuse_another` compares with what is there later; raises `InputError` where none is."""
        mark, commit = self.client.mark(COMMIT), _commit(self.client)
        self._commit = mark, commit
        return commit

    def refuse_another(self) -> None:
        """Raise `InputError` where another store has taken this one's place since `fix`, or is about to.

        Parts of files are checked against their own index alone, which another store's are not at odds with.
        """
        if self._commit is None or (mark := self.client.mark(COMMIT)) == self._commit[0] is not None:
            return
        if _commit(self.client) != self._commit[1]:
            raise InputError(
                f"{self.where}: another store has taken its place since it was opened; rerun the same command"
            )
        self._commit = mark, self._commit[1]  # the same was written again

    def _download(self, name: str) -> bytes:
        """A file, again where its digest is not the commit's: half of it may have come, and called itself whole."""
        if self._digests is None:
            self._digests = self._listed()
        expected, digest, data = self._digests.get(name), "", b""
        for _ in range(TRIES):
            if (got := self.client.get(name)) is None:
                raise missing(self.where, name)
            data = got
            if expected is None or (digest := hashlib.sha256(data).hexdigest()) == expected:
                return data
        raise InputError(
            f"{self.where}/{name}: sha256 expected {shown(expected)}, found {shown(digest)} ({len(data)} bytes); "
            f"python -m shards verify {self.where} tells more"
        )

    def _listed(self) -> dict[str, str]:
        return commit_in((self.root / COMMIT).read_bytes(), self.root, f"{self.where}/{COMMIT}").there

    def came(self, count: int, newest: Path) -> None:
        """Note that so many bytes came into the cache; remove what was used longest ago where they are too many.

        A mapped file stays readable until it is let go.
        """
        with self._lock:
            self._since += count
            known = self._measured is not None and self._since <= self._limit // SLACK
            if known and (self._measured or 0) + self._since <= self._limit:
                return
            files = [path for root in (self.root, self.pieces) for path in root.rglob("*") if path.is_file()]
            # What several processes remove at the same time is gone for one of them.
            stats = sorted(each for path in files if path.suffix != ".tmp" and (each := _use(path)))
            total = sum(size for _, size, _ in stats)
            most = self._limit if total <= self._limit else self._limit - self._limit // SLACK
            for _, size, path in stats:
                if total <= most:
                    break
                if path not in (newest, self.root / COMMIT):
                    path.unlink(missing_ok=True)
                    total -= size
            self._measured, self._since = total, 0


def _use(path: Path) -> tuple[int, int, Path] | None:
    """When a file was last used, and the bytes that it takes: of one with holes fewer than its size."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, min(status.st_size, status.st_blocks * 512), path


class AsTheyAre(RemoteFiles):
    """Every file as it is there now, whatever the commit says of it: for finding damage."""

    def _listed(self) -> dict[str, str]:
        return {}

    def local(self, name: str) -> Path:
        try:
            return super().local(name)
        except InputError:
            if self.client.size(name) is None:
                return self.root / name  # where it is not either
            raise


def names_of(files: Files) -> list[str]:
    """Every file of a store but the commit and the unfinished harvest's, in byte order of the path."""
    if not isinstance(files, RemoteFiles):
        return store_files(files.root)
    if files.where.startswith("http"):
        return []  # a web server does not list
    hidden = (found.name for found in files.client.names() if found.name != COMMIT)
    return sorted(name for name in hidden if not any(part[0] == "." for part in name.split("/")))


def files_of(where: str | Path, cache: Path, cache_bytes: int) -> Files:
    """Local or remote files of the store at `where`.

    A remote commit is fetched anew: another store may have taken its place since it was cached.
    """
    if not is_url(where):
        return LocalFiles(Path(where))
    if hub.is_hub(where):
        return hub.HubFiles(str(where), COMMIT)
    url = str(where).rstrip("/")
    files = RemoteFiles(Client(url), cache / hashlib.sha256(url.encode()).hexdigest()[:16], cache_bytes)
    commit = files.fix()
    cached = files.root / COMMIT
    if cached.is_file() and cached.read_bytes() != commit:
        for root in (files.root, files.pieces):
            for path in root.rglob("*"):
                if path.is_file():
                    path.unlink(missing_ok=True)
    write_whole(cached, commit)
    return files


def as_they_are(url: str, scratch: Path, limit: int) -> Files:
    """The files of a remote store for `verify`, in the empty directory `scratch`, at most `limit` bytes at a time."""
    files = AsTheyAre(Client(url), scratch, limit)
    write_whole(files.root / COMMIT, _commit(files.client))
    return files


def _commit(client: Client) -> bytes:
    """The list of a store's files, fetched again where half of it has come, and called itself whole."""
    for _ in range(TRIES):
        if (commit := client.get(COMMIT)) is None:
            raise missing(client.url, COMMIT)
        if digests_itself(commit):
            return commit
    raise InputError(
        f"{client.url}/{COMMIT}: damaged: its last line does not digest the lines above; copy it there again from "
        "another copy of the store, or remove the store and harvest again"
    )


def upload(root: Path, url: str) -> None:
    """Copy the complete store at `root` to `url`; `files.sha256` last, so that it is never half there."""
    names = sorted(read_commit(root))
    if hub.is_hub(url):
        hub.upload(root, url, f"Activation store {root.name}", [*names, COMMIT])
        return
    target = Client(url, make=True)
    if target.get(COMMIT) not in (None, (root / COMMIT).read_bytes()):
        target.remove([COMMIT])  # of another store, whose files are to be replaced

    def put(name: str) -> int:
        target.put(name, root / name)
        return (root / name).stat().st_size

    total = sum((root / name).stat().st_size for name in names)
    with (
        ThreadPoolExecutor(8) as pool,
        progress("upload", total, "B") as bar,
    ):
        for size in pool.map(put, names):
            bar.update(size)
        put(COMMIT)

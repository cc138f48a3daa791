"""A harvest into an object store: each window is uploaded when it is written, and removed here.

Concurrent harvests cannot corrupt a committed store, however late one of them writes. This needs no clock, no lock and
no strongly consistent listing:

- A window's files go to names of their own (`.harvest/parts/<random>/`), which nobody writes twice. Then its record is
  put under a name where nothing may be yet: of several writers the first decides whose files are the window. The text
  is decided likewise, by plan.json; a record names the plan and the source that it belongs to.
- Only a complete set of records is committed: their files are renamed to their places, which anyone may do again, as
  the records name the same ones for ever; then `files.sha256` is put, where there may be none.

Putting files to their places at once would save the renaming, and two harvests on GPUs, which do not give the same
bytes, could then leave half a window of each. owner.py only spares the second one its work.
"""

import contextlib
import hashlib
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from uuid import uuid4

from common.errors import InputError, shown
from common.files import inside, locked, sha256, size_of, write_whole
from shards.commit import commit_in, store_files
from shards.encode import Mapped
from shards.layout import COMMIT, WORK, Array, dumps
from shards.manifest import Manifest, Source, read_manifest
from shards.objects.client import AT_ONCE, TRIES, WRITABLE, Client, missing
from shards.objects.owner import Owner
from shards.objects.scratch import Scratch
from shards.remote import is_url
from shards.writer import StoreWriter, Text, WindowRows, as_committed, parsed

PARTS = f"{WORK}/parts"
RECORDS = f"{WORK}/records"
PLAN, SOURCE, LOST, ASIDE = (f"{WORK}/{name}" for name in ("plan.json", "source.json", "lost.json", COMMIT))


class ObjectWriter(StoreWriter):
    """An unfinished store at an address; what is done is asked of the other side, what is local is `scratch`."""

    def __init__(self, url: str, scratch: Scratch) -> None:
        super().__init__(scratch.of(url))
        self.where = url
        self._client, self._scratch = Client(url, make=True), scratch
        self._owner = Owner(self._client)
        self._read: dict[str, bytes] = {}
        """What all records belong to, as it was read."""
        self._named: set[str] = set()
        """Objects of their `.harvest` that must be there, whether a listing shows them or not."""
        self._uploads: list[Future[None]] = []
        self._size = 0

    @contextlib.contextmanager
    def lock(self, leads: bool = True) -> Iterator[None]:
        lock = self.root.with_name(f"{self.root.name}.lock")
        with (
            locked(lock, f"{self.where}: another harvest is writing it"),
            self._owner.hold() if leads else contextlib.nullcontext(),
        ):
            shutil.rmtree(self.root, ignore_errors=True)
            try:
                yield
            finally:
                self._scratch.close()
                shutil.rmtree(self.root, ignore_errors=True)
                with contextlib.suppress(InputError):  # what ends the harvest says what is wrong
                    if leads and self.complete:
                        self._clean()

    def _clean(self) -> None:
        """Remove `.harvest`: what a listing shows, and what it may not show yet."""
        self._client.remove({found.name for found in self._client.names(WORK)} | self._named)
        self._client.remove_directories(WORK)

    # -- what is there -----------------------------------------------------------------------------

    @property
    def complete(self) -> bool:
        return self._client.size(COMMIT) is not None

    @property
    def removed(self) -> bool:
        data = self._client.get(COMMIT)
        return data is not None and bool(commit_in(data, self.root, f"{self.where}/{COMMIT}").removed)

    @property
    def has_rows(self) -> bool:
        return (
            self.complete
            or self._client.size(LOST) is not None
            or any(True for _ in self._client.names(RECORDS))
        )

    def _read_work(self, name: str) -> Any:
        data = self._read_once(f"{WORK}/{name}")
        return None if data is None else self._parsed(f"{WORK}/{name}", data)

    def _read_once(self, name: str) -> bytes | None:
        if name not in self._read and (data := self._client.get(name)) is not None:
            self._read[name] = data
            self._named.add(name)
        return self._read.get(name)

    def manifest(self) -> Manifest:
        write_whole(self.root / "zarr.json", self._there("zarr.json"))
        return read_manifest(self.root)

    def _there(self, name: str) -> bytes:
        if (data := self._client.get(name)) is None:
            raise missing(self.where, name)
        return data

    def missing(self) -> list[tuple[str, int]]:
        open_ = [window for window in self._wanted() if not self._record_path(*window).is_file()]
        if not open_:
            return []
        listed = {found.name for found in self._client.names(RECORDS)}
        # A listing may be old, an answer for one name is not.
        asked = [window for window in open_ if self._record_name(*window) not in listed]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            sizes = pool.map(lambda window: self._client.size(self._record_name(*window)), asked)
            return [window for window, size in zip(asked, sizes, strict=True) if size is None]

    # -- the text ----------------------------------------------------------------------------------

    def forget(self) -> None:
        assert not self.has_rows
        self._client.remove([SOURCE, PLAN])
        self._read.clear()
        self.clear()

    def finish_text(self, request: dict[str, Any], text: Text) -> None:
        part = uuid4().hex
        files = {name: sha256(self.root / name) for name in store_files(self.root)}
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for _ in pool.map(
                lambda name: self._client.put_whole(_part(part, name), self.root / name), files
            ):
                pass
        plan = {"request": request, "text": vars(text), "part": part, "files": files}
        self._create(PLAN, dumps(plan))

    def _create(self, name: str, data: bytes) -> None:
        if self._client.create(name, data) is not None:
            raise InputError(
                f"{self.where}: another harvest is writing it, and was first with {name}; wait for it or stop it"
            )
        self._named.add(name)

    def fetch_text(self) -> None:
        """Have the contexts here. What another process has decided since is read anew."""
        self._read.clear()
        plan = self._read_work("plan.json")
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for _ in pool.map(lambda name: self._fetch(name, plan), plan["files"]):
                pass
        self._scratch.keep(size_of(self.root))

    def _fetch(self, name: str, plan: Mapping[str, Any]) -> None:
        path, digest, found = inside(self.root, name), plan["files"][name], ""
        if path.is_file() and sha256(path) == digest:
            return
        for _ in range(TRIES):
            data = self._client.get(_part(plan["part"], name)) if plan["part"] else None
            if data is None:  # it is in its place, by a harvest that was killed as it was finished
                data = self._there(name)
            if (found := hashlib.sha256(data).hexdigest()) == digest:
                write_whole(path, data)
                return
        raise InputError(
            f"{self.where}/{name}: sha256 expected {shown(digest)}, found {shown(found)}; remove the store and harvest "
            "again"
        )

    def begin(self, source: Source, create: bool = True) -> None:
        super().begin(source, create=False)
        if create and self._read_work("source.json") is None:
            self._read[SOURCE] = dumps(source.model_dump())
            self._create(SOURCE, self._read[SOURCE])
        for arrays in self._arrays.values():
            self._scratch.refuse(self.where, most_bytes(arrays, 0))

    @property
    def _begun(self) -> str:
        """What a record belongs to."""
        return hashlib.sha256((self._read_once(PLAN) or b"") + (self._read_once(SOURCE) or b"")).hexdigest()

    def _record_name(self, split: str, window: int) -> str:
        return f"{RECORDS}/{self._record_path(split, window).name}"

    # -- windows -----------------------------------------------------------------------------------

    def write_window(
        self,
        split: str,
        window: int,
        columns: WindowRows,
        max_quantisation_fvu: float,
        max_dimension_fvu: float,
        mapped: Mapped = map,
        during: Callable[[str], AbstractContextManager[None]] = lambda _: contextlib.nullcontext(),
    ) -> None:
        """As on a disk, then have it uploaded. Waits, as `upload`, while the scratch is full.

        Raises what went wrong with an earlier upload.
        """
        self._raise_failed()
        most = most_bytes(self._arrays[split], window)
        self._scratch.take(most, lambda: during("upload"))
        try:
            limits = max_quantisation_fvu, max_dimension_fvu
            super().write_window(split, window, columns, *limits, mapped, during)
            record = self._record(split, window)
            sizes = {name: (self.root / name).stat().st_size for name in record["files"]}
            record |= {"sizes": sizes}
            small = {
                key: record[key] for key in ("rows", "files", "sizes")
            }  # moments are 200 kB at width 2,304
            write_whole(self._record_path(split, window), dumps(small))
        except BaseException:
            self._scratch.give_back(most)
            raise
        size = sum(sizes.values())
        self._scratch.give_back(most - size)
        self._uploads.append(self._scratch.submit(self._upload, split, window, record))

    def _upload(self, split: str, window: int, record: dict[str, Any]) -> None:
        part, name = uuid4().hex, self._record_name(split, window)
        try:
            for file in record["files"]:
                self._client.put_whole(_part(part, file), self.root / file)
            self._create(name, dumps(record | {"part": part, "begun": self._begun}))
        except BaseException:
            self._record_path(split, window).unlink(missing_ok=True)
            raise
        finally:
            for file in record["files"]:
                (self.root / file).unlink(missing_ok=True)
            self._scratch.give_back(sum(record["sizes"].values()))

    def _raise_failed(self) -> None:
        for upload in [each for each in self._uploads if each.done()]:
            self._uploads.remove(upload)
            upload.result()

    def settle(
        self, during: Callable[[str], AbstractContextManager[None]] = lambda _: contextlib.nullcontext()
    ) -> None:
        with during("upload"):
            while self._uploads:
                self._uploads.pop(0).result()

    def size(self) -> int:
        return self._size or sum(map(self.size_of_window, self.records()))

    def size_of_window(self, record: dict[str, Any]) -> int:
        return sum(record["sizes"].values())

    # -- the end -----------------------------------------------------------------------------------

    def finish(self) -> Manifest:
        """Reduce the records into the manifest, put every file to its place, and commit."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for _ in pool.map(self._fetch_record, self._wanted()):
                pass
        if (aside := self._client.get(ASIDE)) is not None:
            write_whole(self.work / COMMIT, aside)
            self.manifest()
        else:
            self._write_metadata()
        manifest = super().finish()
        moves = [(r["part"], name, size) for r in self.records() for name, size in r["sizes"].items()]
        puts = []
        if aside is None:
            plan = self._read_work("plan.json")
            moves += [(plan["part"], name, (self.root / name).stat().st_size) for name in plan["files"]]
            there = {name for _, name, _ in moves}
            puts = [name for name in store_files(self.root) if name not in there]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for _ in pool.map(lambda move: self._place(*move), moves):
                pass
            for _ in pool.map(lambda name: self._client.put_whole(name, self.root / name), puts):
                pass
        self._create(COMMIT, (self.root / COMMIT).read_bytes())
        self._named.discard(COMMIT)
        self._named.add(ASIDE)
        self._size = sum(size for *_, size in moves) + sum((self.root / name).stat().st_size for name in puts)
        return manifest

    def _fetch_record(self, window: tuple[str, int]) -> None:
        name = self._record_name(*window)
        data = self._there(name)
        self._named.add(name)
        if self._parsed(name, data)["begun"] != self._begun:
            raise InputError(
                f"{self.where}/{name}: is of a harvest with other text or settings that wrote at the same time; remove "
                "the store and harvest again"
            )
        write_whole(self._record_path(*window), data)

    def _parsed(self, name: str, data: bytes) -> Any:
        return parsed(data, f"{self.where}/{name}", self.where)

    def _place(self, part: str, name: str, size: int) -> None:
        """Rename an uploaded file; one that is gone was renamed before."""
        if not self._client.move(_part(part, name), name) and (found := self._client.size(name)) != size:
            raise InputError(
                f"{self.where}/{name}: expected {size} bytes, found {found or 0}; remove the store and harvest again"
            )

    def remove_rows(self) -> None:
        raise InputError(f"{self.where}: train rows are removed from stores in a directory only")

    def uncommit(self, lost: list[tuple[str, int]]) -> None:
        with self.lock():
            manifest, commit = self.manifest(), self._there(COMMIT)
            source, text = as_committed(manifest)
            digests = commit_in(commit, self.root, f"{self.where}/{COMMIT}").there
            files = {name: digests[name] for name in digests if is_text(name)}
            left = {
                found.name for found in self._client.names(RECORDS)
            }  # of a harvest killed after its commit
            self._client.remove(left | {self._record_name(*window) for window in lost})
            plan = {"request": source, "text": vars(text), "part": None, "files": files}
            for name, value in ((LOST, lost), (SOURCE, source), (PLAN, plan)):
                self._client.put(name, dumps(value))
            self._client.put(ASIDE, commit)
            self._client.remove([COMMIT])
            self._read.clear()


def _part(part: str, name: str) -> str:
    return f"{PARTS}/{part}/{name}"


def writer_of(path: str, scratch: Scratch) -> StoreWriter:
    """What writes the store in a directory or at an address; raises `InputError` for an address that is only read."""
    if not is_url(path):
        return StoreWriter(Path(path))
    if not path.startswith(WRITABLE):
        raise InputError(
            f"paths.activations: {path}: a harvest writes to a directory, or to an address with {', '.join(WRITABLE)}; "
            "upload it with make upload"
        )
    return ObjectWriter(path, scratch)


def is_text(name: str) -> bool:
    """Whether a file of a store is its text, or the tokenizer."""
    return name == "tokenizer.json" or "/contexts/c/" in name


def most_bytes(arrays: Mapping[str, Array], window: int) -> int:
    """What the files of a window take at most: what does not compress grows by less than a hundredth."""
    raw = sum(
        array.chunks_in_file(window) * math.prod(array.chunk) * array.dtype.itemsize
        for name, array in arrays.items()
        if name != "contexts"
    )
    return raw + raw // 100 + 4096 * len(arrays)

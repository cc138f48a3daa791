"""One address in an object store: its objects by name. Every failure is one line that names the address.

Credentials and endpoints come from the environment, by the names obstore documents (AWS_ACCESS_KEY_ID,
AWS_ENDPOINT_URL, GOOGLE_SERVICE_ACCOUNT, AZURE_STORAGE_ACCOUNT_NAME, ...).
"""

import contextlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import url2pathname

from common.errors import ENVIRONMENT, InputError
from shards.layout import COMMIT
from shards.objects.environment import plain_http
from shards.objects.refusals import reason

WRITABLE = ("s3://", "gs://", "az://", "file://")
"""Addresses that a harvest can be written to: those whose objects can be listed, and written only if absent."""
SCHEMES = (*WRITABLE, "https://", "http://")
BACKOFF = {"max_backoff": timedelta(seconds=10)}
"""Between two attempts: 0.1 s, then a random time of at most twice the last one. obstore's own, of 5xx, 408, 429,
resets and timeouts.
"""
LONGEST = timedelta(seconds=60)
"""After that no attempt is begun; Ctrl-C waits for it too. A server that says nothing at all takes 30 s more."""
FIRST = {"max_retries": 8, "retry_timeout": LONGEST, "backoff": BACKOFF}
"""Until there was an answer, as a slip in an address never gets one: seconds, where connections are refused."""
RETRIES = {"max_retries": 1000, "retry_timeout": LONGEST, "backoff": BACKOFF}
"""From then on: an outage of less than a minute ends nothing."""
TIMEOUTS = {"connect_timeout": "10s", "read_timeout": "30s", "timeout": "1h"}
"""Of a request: obstore's 30 s for the whole of it would end a large file on a slow line."""
AT_ONCE = 32
"""Requests under way: at 50 ms each, 640 a second."""
TRIES = 6
"""Attempts at an object whose size or digest is wrong; obstore retries a body that ends early, not a wrong one. If a
tenth of all bodies were truncated, one in a million would be truncated six times in a row.
"""


class Found(NamedTuple):
    """An object in a listing."""

    name: str
    size: int


class Client:
    """The objects below `url`. Several threads may call it; each call is retried, as FIRST says, then RETRIES.

    Raises `InputError` where an answer does not come, or is a refusal.
    """

    def __init__(self, url: str, make: bool = False) -> None:
        """`make`: whether the directory of a file:// address is made, where it is not there."""
        self.url = url.rstrip("/")
        self._first, self._later = _open(self.url, make, FIRST), _open(self.url, make, RETRIES)
        self._answered = False

    @property
    def _store(self) -> Any:
        return self._later if self._answered else self._first

    def get(self, name: str) -> bytes | None:
        """The whole object; None where there is none."""
        import obstore

        with self._explained(name), _perhaps_absent(self.url):
            return bytes(obstore.get(self._store, name).bytes())

    def end(self, name: str, length: int) -> tuple[bytes, int] | None:
        """The last `length` bytes of an object, or all where it is shorter, and its size; None where there is none.

        All too from a web server that does not give parts.
        """
        import obstore
        from obstore.exceptions import BaseError

        with self._explained(name), _perhaps_absent(self.url):
            try:
                result = obstore.get(self._store, name, options={"range": {"suffix": length}})
                return bytes(result.bytes()), result.meta["size"]
            except BaseError:
                if (data := self._whole_from_web(name)) is None:
                    raise
                return data, len(data)

    def piece(self, name: str, start: int, stop: int) -> bytes | None:
        """Bytes [start, stop) of an object, or cut from all of it (http servers without parts); None: no object."""
        import obstore
        from obstore.exceptions import BaseError

        with self._explained(name), _perhaps_absent(self.url):
            try:
                return bytes(obstore.get_range(self._store, name, start=start, end=stop))
            except BaseError:
                if (data := self._whole_from_web(name)) is None:
                    raise
                return data[start:stop]

    def _whole_from_web(self, name: str) -> bytes | None:
        """An object whole, when a part was refused: some web servers give no parts. None elsewhere."""
        return self.get(name) if self.url.startswith("http") else None

    def size(self, name: str) -> int | None:
        """Bytes of an object; None where there is none. Unlike a listing, it is never old."""
        import obstore

        with self._explained(name), _perhaps_absent(self.url):
            return obstore.head(self._store, name)["size"]

    def mark(self, name: str) -> tuple[object, ...] | None:
        """What changes when an object is written again, as far as the object store tells; None where there is none.

        None too from a web server that does not answer HEAD.
        """
        import obstore
        from obstore.exceptions import BaseError

        with self._explained(name), _perhaps_absent(self.url):
            try:
                told = obstore.head(self._store, name)
            except BaseError:
                if self.url.startswith("http"):
                    return None
                raise
            return told["e_tag"], told["size"], told["last_modified"]

    def put(self, name: str, data: bytes | Path) -> None:
        """Write an object, in the place of any other of the name."""
        import obstore

        with self._explained(name, "cannot be written"):
            obstore.put(self._store, name, data)

    def create(self, name: str, data: bytes) -> bytes | None:
        """Write an object only if there is none of the name. None if `data` is stored then, else the bytes that are.

        If the answer to the own write is lost, the retry is refused; the stored bytes are then the own ones.
        """
        import obstore
        from obstore.exceptions import AlreadyExistsError

        with self._explained(name, "cannot be written"):
            while True:
                try:
                    obstore.put(self._store, name, data, mode="create", use_multipart=False)
                    break
                except AlreadyExistsError:
                    if (there := self.get(name)) is not None:  # else it has gone since
                        return None if there == data else there
        there = None
        for trial in range(TRIES):
            if (there := self.get(name)) is None or there == data:
                return None
            if not data.startswith(there):
                return there
            if trial < TRIES - 1:
                self.put(name, data)  # half of it had arrived
        raise InputError(
            f"{self.url}/{name}: {len(data)} bytes were written, {len(there or b'')} are stored; "
            "run the same command again"
        )

    def put_whole(self, name: str, path: Path) -> None:
        """`put` a file, and ask how much of it is there."""
        size, there = path.stat().st_size, None
        for _ in range(TRIES):
            self.put(name, path)
            if (there := self.size(name)) == size:
                return
        raise InputError(
            f"{self.url}/{name}: {size} bytes were written, {there or 0} are stored; "
            "run the same command again"
        )

    def move(self, source: str, target: str) -> bool:
        """Have the object store rename an object; whether it was there."""
        import obstore

        what = f"cannot be copied to {target}"
        with self._explained(source, what), _perhaps_absent(self.url):
            obstore.rename(self._store, source, target)
            return True
        return False

    def names(self, below: str = "") -> Iterator[Found]:
        """Objects whose names begin with the folder `below`. A listing may be old (eventually consistent)."""
        import obstore

        with self._explained(f"{below}/".lstrip("/"), "cannot be listed"):
            for page in obstore.list(self._store, below or None):
                yield from (Found(each["path"], each["size"]) for each in page)

    def remove(self, names: Iterable[str]) -> None:
        """Remove objects; those that are not there are no error."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for _ in pool.map(self._remove, names):
                pass

    def remove_directories(self, below: str) -> None:
        """Remove the directories `below`, which hold no objects any more: only a file:// address has any."""
        if (root := _folder(self.url)) is not None:
            folder = root / below
            for each in [*sorted(folder.rglob("*"), reverse=True), folder]:
                with contextlib.suppress(OSError):  # not empty: it was written to meanwhile
                    each.rmdir()

    def _remove(self, name: str) -> None:
        import obstore

        with self._explained(name, "cannot be removed"), _perhaps_absent(self.url):
            obstore.delete(self._store, name)

    @contextlib.contextmanager
    def _explained(self, name: str, what: str = "cannot be read") -> Iterator[None]:
        """One line of whatever goes wrong: obstore raises one class per kind and provider."""
        try:
            yield
            self._answered = True
        except InputError:
            raise
        except BaseException as error:
            panicked = type(error).__name__ == "PanicException"  # of obstore's Rust; no Exception
            if not (isinstance(error, Exception) or panicked):
                raise
            if isinstance(error, OSError) and error.errno in ENVIRONMENT:
                raise
            where = f"{self.url}/{name}"
            raise InputError(f"{where}: {what}: {reason(error, self.url)}") from error


@contextlib.contextmanager
def _perhaps_absent(url: str) -> Iterator[None]:
    """Suppress FileNotFoundError of an object that is not there; raise `InputError` where its bucket is not."""
    try:
        yield
    except FileNotFoundError as error:
        if any(code in str(error) for code in ("NoSuchBucket", "ContainerNotFound", "bucket does not exist")):
            raise InputError(f"{url}: there is no such bucket") from error


def missing(url: str, name: str) -> InputError:
    """What to say of an object that is not there."""
    what = "missing"
    if name == COMMIT:
        what = f"no complete store there ({COMMIT} is missing); make harvest writes or continues it"
    return InputError(f"{url}/{name}: {what}")


def committed(url: str) -> bool:
    """Whether a complete store is at an address; raises `InputError` where that cannot be asked."""
    if (folder := _folder(url)) is not None:  # a client of one that is not there cannot be made
        return (folder / COMMIT).is_file()
    return Client(url).size(COMMIT) is not None


def _folder(url: str) -> Path | None:
    """The directory of a file:// address."""
    scheme, _, path, *_ = urlsplit(url)
    return Path(url2pathname(path)) if scheme == "file" else None


def _open(url: str, make: bool, retries: dict[str, Any]) -> Any:
    from obstore import store

    # What follows is no part of an object's name: stores of several layers would lie in each other's place.
    if wrong := next((mark for mark in "#?" if mark in url and url.startswith(WRITABLE)), None):
        raise InputError(f"{url}: an address must not contain {wrong}; write %{ord(wrong):02X}")

    client = TIMEOUTS | ({"allow_http": True} if plain_http(url) else {})
    options: dict[str, Any] = {"client_options": client, "retry_config": retries}
    if url.startswith("file://"):
        options = {"mkdir": make}
    try:
        return store.from_url(url, **options)
    except Exception as error:  # obstore raises one class per provider
        raise InputError(f"{url}: cannot be opened: {reason(error, url)}") from error

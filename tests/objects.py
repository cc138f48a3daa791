"""An object store on loopback with S3's requests, objects in memory, and whatever goes wrong with a real one.

Written from what obstore asks and S3's documentation; tests/shards/test_remote.py has moto's beside it.
"""

# ruff: noqa: N802 - http.server gives the names

import hashlib
import random
import re
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape, unescape

import pytest

from shards.objects import client
from tests.servers import Handler, Loopback, serving

DATE = "Wed, 21 Oct 2015 07:28:00 GMT"
Fault = Callable[[str, str], str | None]
"""(method, object's name) -> what goes wrong with the request: a status, "reset", "cut" (the body ends early), "half"
(half of it, as if it were whole), "lost" (it is done, and the answer is a reset) or "old" (a listing of before); or
nothing."""


class Bucket(Loopback):
    """`objects` by name; `fault` is asked about every request; `delay` seconds pass before each answer."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Requests)
        self.objects: dict[str, bytes] = {}
        self.old: dict[str, bytes] = {}
        """What an old listing shows."""
        self.fault: Fault = lambda *_: None
        self.delay = 0.0
        self.asked: Counter[str] = Counter()
        self.sent = 0
        """Bytes of all bodies."""
        self.unknown: list[str] = []
        self.lock = threading.Lock()

    def below(self, folder: str) -> dict[str, bytes]:
        """Objects in a folder, by their names in it."""
        with self.lock:
            return {
                n.removeprefix(f"{folder}/"): d for n, d in self.objects.items() if n.startswith(f"{folder}/")
            }


@contextmanager
def bucket() -> Iterator[Bucket]:
    """A running one, which s3:// addresses lead to."""
    with serving(Bucket()) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in environment(server.url).items():
            patch.setenv(name, value)
        yield server
        assert server.unknown == []


@contextmanager
def moto_bucket() -> Iterator[str]:
    """An address in moto's S3 server."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(f"http://{host}:{port}").items():
            patch.setenv(name, value)
        request = urllib.request.Request(f"http://{host}:{port}/rows", method="PUT")
        urllib.request.urlopen(request).close()
        yield "s3://rows/activations"
    server.stop()


def environment(url: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def now_and_then(share: float, *kinds: str, seed: int = 0, only: str = "") -> Fault:
    """One of `kinds` with this share of the requests, of methods in `only` (all)."""
    rng, lock = random.Random(seed), threading.Lock()

    def fault(method: str, _: str) -> str | None:
        with lock:
            return rng.choice(kinds) if rng.random() < share and (not only or method in only) else None

    return fault


def quick(monkeypatch: pytest.MonkeyPatch, retries: int = 12) -> None:
    """Retries a tenth of a second after each other, not up to ten."""
    tenth = timedelta(milliseconds=10)
    backoff = {"init_backoff": tenth, "max_backoff": 5 * tenth}
    for when in ("FIRST", "RETRIES"):
        monkeypatch.setattr(client, when, {"max_retries": retries, "backoff": backoff})


class _Requests(Handler):
    server: Bucket

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError:  # a client that was killed
            self.close_connection = True

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        split = urlsplit(self.path)
        _, _, name = unquote(split.path).removeprefix("/").partition("/")
        query = {key: values[0] for key, values in parse_qs(split.query, keep_blank_values=True).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        method = "LIST" if "list-type" in query else self.command
        with self.server.lock:
            self.server.asked[method] += 1
        time.sleep(self.server.delay)
        fault = self.server.fault(method, name or query.get("prefix", ""))
        if fault == "reset":
            self._reset()
        elif fault and fault.isdecimal():
            self.send(int(fault), b"<Error><Code>SlowDown</Code></Error>")
        elif method == "LIST":
            self._list(query.get("prefix", ""), self.server.old if fault == "old" else self.server.objects)
        elif self.command in ("GET", "HEAD"):
            self._get(name, fault)
        elif self.command == "PUT" and not query:
            self._put(name, body[: len(body) // 2] if fault == "half" else body, fault)
        elif self.command == "POST" and "delete" in query:
            names = [unescape(each) for each in re.findall("<Key>(.*?)</Key>", body.decode())]
            with self.server.lock:
                for each in names:
                    self.server.objects.pop(each, None)
            done = "".join(f"<Deleted><Key>{escape(each)}</Key></Deleted>" for each in names)
            self._reset() if fault == "lost" else self.send(
                200, f"<DeleteResult>{done}</DeleteResult>".encode()
            )
        else:  # uploads in parts too: of files larger than those of tests
            self.server.unknown.append(f"{self.command} {self.path}")
            self.send(501, b"")

    def _reset(self) -> None:
        self.close_connection = True
        self.connection.close()

    def _get(self, name: str, fault: str | None) -> None:
        data = self.server.objects.get(name)
        if data is None:
            self.send(404, b"<Error><Code>NoSuchKey</Code></Error>")
            return
        headers, status, size = {"ETag": _tag(data), "Last-Modified": DATE}, 200, len(data)
        if asked := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or ""):
            first, last = asked.groups()
            start = int(first) if first else max(0, size - int(last))
            stop = min(int(last) + 1, size) if first and last else size
            data, status = data[start:stop], 206
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        if fault == "half":
            data = data[: len(data) // 2]
        with self.server.lock:
            self.server.sent += len(data) if self.command == "GET" else 0
        if fault != "cut" or self.command == "HEAD":
            self.send(status, data, headers)
            return
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2])
        self.wfile.flush()
        self._reset()

    def _put(self, name: str, body: bytes, fault: str | None) -> None:
        source, only_new = self.headers.get("x-amz-copy-source"), self.headers.get("If-None-Match") == "*"
        with self.server.lock:
            if source:
                _, _, source = unquote(source).removeprefix("/").partition("/")
                body = self.server.objects.get(source, b"")
            absent = source is not None and source not in self.server.objects
            taken = only_new and name in self.server.objects
            if not absent and not taken:
                self.server.objects[name] = body
        if fault == "lost":
            self._reset()
        elif absent or taken:
            self.send(404 if absent else 412, b"<Error><Code>No</Code></Error>")
        elif source:
            self.send(200, f"<CopyObjectResult><ETag>{_tag(body)}</ETag></CopyObjectResult>".encode())
        else:
            self.send(200, b"", {"ETag": _tag(body)})

    def _list(self, prefix: str, objects: dict[str, bytes]) -> None:
        with self.server.lock:
            found = sorted((name, data) for name, data in objects.items() if name.startswith(prefix))
        each = "".join(
            f"<Contents><Key>{escape(name)}</Key><LastModified>2015-10-21T07:28:00.000Z</LastModified>"
            f"<ETag>{escape(_tag(data))}</ETag><Size>{len(data)}</Size></Contents>"
            for name, data in found
        )
        self.send(
            200, f"<ListBucketResult><IsTruncated>false</IsTruncated>{each}</ListBucketResult>".encode()
        )


def _tag(data: bytes) -> str:
    return f'"{hashlib.md5(data[:4096], usedforsecurity=False).hexdigest()}-{len(data)}"'

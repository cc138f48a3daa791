"""What an object store's refusals, and slips in the variables of its environment, look like: one line each."""

import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import pytest

from common.errors import InputError
from shards.objects import client
from shards.objects.client import Client
from shards.objects.environment import CREDENTIALS, ENDPOINTS, SIGNED, plain_http
from shards.objects.refusals import reason
from tests.objects import bucket, environment, quick
from tests.servers import Handler, Loopback, serving

CHECK = f"; check {CREDENTIALS['s3']}"
DENIED = (
    b"<?xml version='1.0'?>\n<Error>\n  <Code>AccessDenied</Code><Message>Access\n Denied</Message></Error>"
)
GOOGLE = b'{"error": {"code": 401, "message": "Anonymous caller does not have access"}}'


class Refuser(Loopback):
    """Answers every request with a status and a body."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(("127.0.0.1", 0), _Refusal)
        self.status, self.body = status, body


class _Refusal(Handler):
    server: Refuser

    def __getattr__(self, name: str) -> Callable[[], None]:
        if not name.startswith("do_"):
            raise AttributeError(name)
        return self._refuse

    def _refuse(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send(self.server.status, self.server.body)


@contextmanager
def refusing(status: int, body: bytes) -> Iterator[str]:
    with serving(Refuser(status, body)) as server, pytest.MonkeyPatch.context() as patch:
        quick(patch, retries=2)
        for name, value in environment(server.url).items():
            patch.setenv(name, value)
        yield server.url


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (403, DENIED, f"403 Forbidden, AccessDenied: Access Denied{CHECK}"),
        (403, b"<html><title>Code</title>\n<Message\n", f"403 Forbidden{CHECK}"),
        (401, GOOGLE, f"401 Unauthorized, Anonymous caller does not have access{CHECK}"),
        (401, b"{not JSON", f"401 Unauthorized{CHECK}"),
        (401, b'{"error": "denied"}', f"401 Unauthorized{CHECK}"),
        (400, b"<Error><Code>ExpiredToken</Code></Error>", "400 Bad Request, ExpiredToken"),
        (404, b"<Error><Code>NoSuchBucket</Code></Error>", "404 Not Found, NoSuchBucket"),
        (503, b"<Error><Code>SlowDown</Code></Error>", "503 Service Unavailable, SlowDown (after 2 retries)"),
        (301, b"", "the bucket is in another region; set AWS_REGION"),
    ],
)
def test_a_refusal_says_its_status_its_words_and_what_to_do(status: int, body: bytes, said: str) -> None:
    with refusing(status, body) as url:
        with pytest.raises(InputError) as listed:
            list(Client("s3://bucket/x").names("records"))
        assert str(listed.value) == f"s3://bucket/x/records/: cannot be listed: {said}"
        with pytest.raises(InputError) as written:
            Client("s3://bucket/x").put("a", b"1")
        assert str(written.value) == f"s3://bucket/x/a: cannot be written: {said}"
        if status in (401, 403, 400):
            with pytest.raises(InputError) as read:
                Client(f"{url}/x").get("a")
            assert str(read.value) == f"{url}/x/a: cannot be read: {said.removesuffix(CHECK)}"


def test_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch, retries=1)
    with serving(Refuser(200, b"")) as gone:
        url = gone.url
    for name, value in environment(url).items():
        monkeypatch.setenv(name, value)
    for address in ("s3://bucket/x", f"{url}/x"):
        with pytest.raises(InputError) as stopped:
            Client(address).get("a")
        assert str(stopped.value) == f"{address}/a: cannot be read: no answer from {url} (after 1 retries)"


@pytest.mark.parametrize("scheme", CREDENTIALS)
def test_no_credentials(scheme: str) -> None:
    """Then obstore asks where a cloud's own machines would; tests must not."""
    error = ValueError("Error performing PUT http://169.254.169.254/latest/api/token - error sending request")
    assert reason(error, f"{scheme}://b/x") == f"no credentials; set {CREDENTIALS[scheme]}"


def test_no_account_of_azure(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match=r"^az://c/x: cannot be opened: no account; set AZURE_STORAGE_ACC"):
        Client("az://c/x")


@pytest.mark.parametrize(("scheme", "name"), [(s, name) for s, names in ENDPOINTS.items() for name in names])
def test_endpoints(scheme: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that end obstore with a stack trace are refused; http:// is allowed by each name."""
    for other in ENDPOINTS[scheme]:
        monkeypatch.delenv(other, raising=False)
    assert not plain_http(f"{scheme}://b/x")
    for wrong in (
        "",
        "localhost:9000",
        "127.0.0.1:1",
        "http://",
        "http://a b",
        " http://a",
        "ftp://a",
        "http:///x",
    ):
        monkeypatch.setenv(name, wrong)
        with pytest.raises(
            InputError, match=rf"^{name}: expected .* found {re.escape(repr(wrong))}; correct"
        ):
            Client(f"{scheme}://b/x")
        assert not plain_http("gs://b/x")
    for right in ("http://localhost:9000", "https://s3.example.org/", "http://[::1]:9000", "https://a/b?c=d"):
        monkeypatch.setenv(name, right)
        assert plain_http(f"{scheme}://b/x") == right.startswith("http://")


@pytest.mark.parametrize("name", SIGNED["s3"])
def test_variables_with_a_line_break(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a file that was read whole; what is secret is not shown."""
    monkeypatch.setenv(name, "hunter2\n")
    with pytest.raises(InputError, match=rf"^{name}: its value( \(not shown\))? contains a space") as stopped:
        Client("s3://b/x")
    assert "hunter2" not in str(stopped.value)
    plain_http("gs://b/x")


def test_a_panic_of_obstore_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment("http://127.0.0.1:1").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "\x01")
    with pytest.raises(InputError, match=r"^s3://b/x/a: cannot be read: .*InvalidHeaderValue"):
        Client("s3://b/x").get("a")


def test_an_outage_ends_nothing_once_there_was_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until then a few attempts are enough: an address with a slip never answers."""
    tenth = timedelta(milliseconds=10)
    for when, most in (("FIRST", 2), ("RETRIES", 1000)):
        own = {**getattr(client, when), "backoff": {"init_backoff": tenth, "max_backoff": tenth}}
        assert own["retry_timeout"] == timedelta(seconds=60)
        assert own["max_retries"] in (8, 1000)
        monkeypatch.setattr(client, when, own | {"max_retries": most})
    with bucket() as server:
        server.objects["x/a"] = b"1"
        left = itertools.count(30, -1)
        server.fault = lambda *_: "503" if next(left) > 0 else None
        with pytest.raises(InputError, match=r"503 Service Unavailable, SlowDown \(after 2 retries\)"):
            Client("s3://bucket/x").get("a")
        server.fault = lambda *_: None
        known = Client("s3://bucket/x")
        assert known.get("b") is None
        left = itertools.count(30, -1)
        server.fault = lambda *_: "503" if next(left) > 0 else None
        assert known.get("a") == b"1"


@pytest.mark.parametrize("code", ["NoSuchBucket", "ContainerNotFound"])
def test_a_bucket_that_is_not_there_is_not_taken_for_an_absent_object(code: str) -> None:
    body = f"<Error><Code>{code}</Code><Message>The specified one does not exist</Message></Error>".encode()
    with refusing(404, body), pytest.raises(InputError, match=r"^s3://bucket/x: there is no such bucket$"):
        Client("s3://bucket/x").get("a")
    with refusing(404, b"<Error><Code>NoSuchKey</Code></Error>"):
        assert Client("s3://bucket/x").get("a") is None

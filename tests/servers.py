"""Servers on loopback that stand for those of the net."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import TypeVar

S = TypeVar("S", bound=ThreadingHTTPServer)


class Loopback(ThreadingHTTPServer):
    """At a free port; a thread for each request."""

    daemon_threads = True
    request_queue_size = 64

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    """Keeps connections open, and says nothing on standard error."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    """Else a body waits 40 ms, until the client confirms the headers."""

    def log_message(self, *_: object) -> None:
        pass

    def send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def serving(server: S) -> Iterator[S]:
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

"""When a process of several nodes ends or can no longer be reached, the others end within half a minute.

torch.distributed notices a process that has ended only at the next exchange, which in a harvest is at its end, and a
machine that has vanished only after 10 minutes (nccl) or 30 (gloo). So rank 0 keeps an idle connection to each of the
other ranks. The kernel closes it when a process ends, and probes the other machine after some seconds of silence. A
process that is only slow, or stopped, keeps its connection: its kernel answers.
"""

import json
import os
import secrets
import selectors
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch.distributed as dist

from common.files import write_whole
from common.nodes.environment import here, place, rank, world

SILENT = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
"""Seconds of silence before the first probe, seconds between probes, unanswered probes: a machine is lost in 25 s."""
GRACE = 2
"""Seconds in which a process that is ending for a reason of its own can print it and end by itself."""
LOOK = 0.5
"""Seconds between checks whether this process is ending."""
ANSWER = 60
"""Seconds in which a connection must be made; all processes are running by then."""
WORD = struct.Struct("!i")
"""The only message on a connection: the number of a rank that is lost, or BYE."""
BYE = -1


@contextmanager
def watched(store: dist.Store | None) -> Iterator[None]:  # pyright: ignore[reportPrivateImportUsage]
    """While this lasts, the loss of another process ends this one. `store`: where all processes have met.

    Leaving it without an error says goodbye to the others, which go on.
    """
    if store is None or world() == here():  # torchrun itself ends the processes of a node
        yield
        return
    ending = threading.Event()
    with ExitStack() as stack:
        others = {stack.enter_context(connection): other for connection, other in _connections(store)}
        watcher = threading.Thread(target=_watch, args=(others, ending), daemon=True)
        watcher.start()
        try:
            yield
            _tell(others, BYE)
        finally:
            ending.set()
            watcher.join()


def _connections(store: dist.Store) -> list[tuple[socket.socket, int]]:  # pyright: ignore[reportPrivateImportUsage]
    """(connection, rank at its other end): rank 0 has one to every rank, each other rank one to rank 0."""
    if rank():
        port, password = store.get("watch").decode().split()
        connection = socket.create_connection((os.environ["MASTER_ADDR"], int(port)), timeout=ANSWER)
        connection.sendall(bytes.fromhex(password) + WORD.pack(rank()))
        found = {0: connection}
    else:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        with socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=world()) as server:
            server.settimeout(ANSWER)
            password = secrets.token_bytes(16)
            store.set("watch", f"{server.getsockname()[1]} {password.hex()}")
            found = _called(server, password)
    for connection in found.values():
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in SILENT.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return [(connection, other) for other, connection in found.items()]


def _called(server: socket.socket, password: bytes) -> dict[int, socket.socket]:
    """The connections of all other ranks, by rank. A connection without the password is closed."""
    found = dict[int, socket.socket]()
    while len(found) < world() - 1:
        connection, _ = server.accept()
        connection.settimeout(ANSWER)
        with suppress(OSError):
            said = connection.recv(len(password) + WORD.size, socket.MSG_WAITALL)
            if said[: len(password)] == password:
                found[WORD.unpack(said[len(password) :])[0]] = connection
                continue
        connection.close()
    return found


def _tell(others: dict[socket.socket, int], word: int) -> None:
    for connection in others:
        with suppress(OSError):  # that process has ended too
            connection.sendall(WORD.pack(word))


def _watch(others: dict[socket.socket, int], ending: threading.Event) -> None:
    """Watch until this process ends or all others have said goodbye; end this process when one of them is lost."""
    with selectors.DefaultSelector() as selector:
        for connection, other in others.items():
            selector.register(connection, selectors.EVENT_READ, (connection, other))
        while selector.get_map() and not ending.is_set():
            for key, _ in selector.select(LOOK):
                connection, other = key.data
                lost = _word(connection, other)
                selector.unregister(connection)
                if lost != BYE:
                    if rank() == 0:
                        _tell(others, lost)
                    if not ending.wait(GRACE):
                        _end(lost)
                    return


def _word(connection: socket.socket, other: int) -> int:
    """The message of `other`; its own number, as a lost rank, if the connection was closed without one."""
    with suppress(OSError):
        said = connection.recv(WORD.size, socket.MSG_WAITALL)
        return WORD.unpack(said)[0] if len(said) == WORD.size else other
    return other


def _end(lost: int) -> None:
    line = (
        f"rank {lost} of {world()} has ended or cannot be reached; its output or its node's tells why, and the same "
        "command continues"
    )
    if not left_to_others(line):
        print(f"error: {place()}{line}", file=sys.stderr, flush=True)
    os._exit(2)  # whatever the main thread waits for


def left_to_others(line: str) -> bool:
    """Whether another process of this node prints why all end: torchrun's launcher, for which `line` is left in a file,
    or else the node's first process.
    """
    if note := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        said = {"message": place() + line, "timestamp": int(time.time())}
        write_whole(Path(note), json.dumps(said).encode())
    return bool(note) or os.environ.get("LOCAL_RANK", "0") != "0"

"""The launchers of several nodes: where they meet (torchrun's c10d rendezvous), and what ends them."""

import hashlib
import os
import re
import socket
import stat
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

from common.errors import InputError, first_line
from common.processes import waiting

SOON = 5
"""Seconds after which a node that waits for the others says so."""
JOIN = 600
"""Seconds in which all nodes must join: one node's launcher may start minutes after another's."""
ANSWER = 40
"""Seconds in which the head's launcher must answer the other nodes."""
SILENT = 20
"""Seconds without a reply after which the head's machine counts as lost."""
KIND = "c10d-ended-together"


@dataclass(frozen=True)
class Nodes:
    """How many nodes work together, and where their launchers meet."""

    count: int
    head: str

    @classmethod
    def of(cls, count: str | None, head: str | None) -> "Nodes | None":
        """From the values of NODES and HEAD; None for a single node. Raises `InputError` for values that do not fit."""
        if count is not None and not (count.isdecimal() and int(count)):
            raise InputError(f"NODES: expected a whole number of nodes, 1 or more, found {count!r}")
        nodes = int(count or "1")
        if nodes == 1 and head is None:
            return None
        place = re.fullmatch(r"(?:[^\s,/\[\]]+|\[[^\s,/\[\]]+\]):(\d{1,5})", head or "")
        if not (place and 0 < int(place[1]) < 2**16):
            raise InputError(
                f"HEAD: expected host:port of one of the {nodes} nodes, the same on every node, found "
                f"{repr(head) if head else 'none'}; for example NODES={nodes} HEAD=gpu-1:29400"
            )
        if nodes == 1:
            raise InputError(f"NODES: HEAD={head} needs several nodes; give NODES=n too, or leave HEAD out")
        return cls(nodes, head or "")

    def options(self, command: Sequence[str]) -> list[str]:
        """torchrun's options; only nodes that start the same `command` meet.

        They say whether this node is the head, which torchrun would decide by the host's name alone.
        """
        conf = f"join_timeout={JOIN},is_host={int(self._find_head())}"
        name = hashlib.sha256("\n".join(command).encode()).hexdigest()[:16]
        rendezvous_handler_registry.register(KIND, _ended_together)
        meeting = f"--rdzv-id {name} --rdzv-backend {KIND} --rdzv-endpoint {self.head} --rdzv-conf {conf}"
        return ["--nnodes", str(self.count), *meeting.split()]

    def _find_head(self) -> bool:
        """Whether this node is the head: it has the head's address, and the port is free. Else wait for its answer.

        If nothing answers, or a program other than torchrun, the process ends here with a line: torchrun's own wait has
        no limit if the connection is accepted and nothing is sent.
        """
        host, _, port = self.head.rpartition(":")
        with suppress(OSError), socket.create_server((host.strip("[]"), int(port))):
            return True
        watch = threading.Timer(ANSWER, self._end)
        watch.daemon = True
        watch.start()
        limit = timedelta(seconds=2 * ANSWER)
        try:
            with waiting(), _announced(f"waiting for {self.head} to answer, at most {ANSWER} s"):
                dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
                    host, int(port), is_master=False, timeout=limit, wait_for_workers=False
                )
        except dist.DistError:
            self._end()
        finally:
            watch.cancel()
        return False

    def _end(self) -> None:
        try:
            socket.getaddrinfo(self.head.rpartition(":")[0].strip("[]"), None)
            why = "no torchrun answers"
        except OSError as error:
            why = f"its name is not known: {error.strerror}"
        print(f"error: {self.parted(why)}", file=sys.stderr, flush=True)
        os._exit(2)  # also ends the thread that waits in C++

    def parted(self, why: Exception | str) -> str:
        """The error line of a node that did not meet the others, or has lost them."""
        here = f"node {socket.gethostname()}: "
        if isinstance(why, RendezvousClosedError | RendezvousConnectionError):
            other = "another node" if isinstance(why, RendezvousClosedError) else f"the head {self.head}"
            return (
                f"{here}{other} has ended or cannot be reached; its output tells why, and the same command on "
                "every node continues"
            )
        told = why if isinstance(why, str) else f"{first_line(why):.200}"
        return (
            f"HEAD: {here}the {self.count} nodes did not meet at {self.head} ({told}); start the same command on "
            "every node, also on the head, and open the port there, or choose another port if that one is in use"
        )


def _ended_together(parameters: RendezvousParameters) -> RendezvousHandler:
    """torchrun's c10d rendezvous, but a node's launcher ends as soon as another's has given up. Without this it ends
    when its own processes notice, in a harvest perhaps only at its end.
    """
    backend, store = create_backend(parameters)
    _lose_what_is_silent()
    handler = create_handler(store, backend, parameters)
    waiting = handler.num_nodes_waiting

    def unless_closed() -> int:
        if handler.is_closed():
            raise RendezvousClosedError
        return waiting()

    come = handler.next_rendezvous

    def announced() -> RendezvousInfo:
        nodes = f"all {parameters.min_nodes} nodes to join at {parameters.endpoint} with this same command"
        with _announced(f"waiting for {nodes}, at most {JOIN} s"):
            return come()

    handler.next_rendezvous = announced
    handler.num_nodes_waiting = unless_closed  # torchrun asks ten times a second while all goes well
    handler.get_backend = lambda: KIND
    return handler


@contextmanager
def _announced(line: str) -> Iterator[None]:
    """Print the line if this lasts longer than `SOON`."""
    note = threading.Timer(SOON, print, [line], {"file": sys.stderr, "flush": True})
    note.daemon = True
    note.start()
    try:
        yield
    finally:
        note.cancel()


def _lose_what_is_silent() -> None:
    """Have the kernel close a connection (here: to the head's launcher) when the other side acknowledges nothing.

    Otherwise torchrun waits on it until the kernel gives up, after a quarter of an hour. Linux only.
    """
    folder = Path("/proc/self/fd")
    for entry in folder.iterdir() if folder.exists() else ():
        with suppress(OSError):
            if stat.S_ISSOCK(entry.stat().st_mode):
                with socket.socket(fileno=os.dup(int(entry.name))) as connection:
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENT * 1000)

"""Who is writing a store in an object store: an object with the writer's name, changed every few seconds.

It spares a second harvest its work, and says who is at work. What is committed does not depend on it (writer.py): a
writer that was stopped for long enough to count as dead, and goes on, does no harm. So no clocks are compared: whoever
comes second looks for PATIENCE seconds whether the object changes.
"""

import contextlib
import json
import os
import platform
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from uuid import uuid4

from common.errors import InputError
from shards.layout import WORK
from shards.objects.client import Client

NAME = f"{WORK}/owner.json"
BEAT = 10.0
"""Seconds between two changes."""
PATIENCE = 3.5 * BEAT


class Owner:
    """The object of one store, as it was when this was made."""

    def __init__(self, client: Client) -> None:
        self._client, self._id = client, uuid4().hex
        self._seen, self._since = client.get(NAME), time.monotonic()

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Be the writer while this lasts; raises `InputError` where another one is alive."""
        self._wait_for_the_other()
        ended = threading.Event()
        beats = threading.Thread(target=self._beat, args=(ended,), daemon=True)
        beats.start()
        try:
            yield
        finally:
            ended.set()
            beats.join()
            with contextlib.suppress(InputError):  # what ends the harvest says what is wrong
                self._client.remove([NAME])

    def _wait_for_the_other(self) -> None:
        while (there := self._client.create(NAME, self._named(0))) is not None:
            other = _Other.read(there)
            if other.is_dead or (there == self._seen and time.monotonic() - self._since > PATIENCE):
                self._client.remove([NAME])
            elif self._seen is not None and there != self._seen:
                raise InputError(
                    f"{self._client.url}: another harvest is writing it (process {other.process} of {other.machine}); "
                    "wait for it or stop it"
                )
            else:
                if self._seen is None:
                    self._seen, self._since = there, time.monotonic()
                time.sleep(BEAT / 10)

    def _beat(self, ended: threading.Event) -> None:
        count = 0
        while not ended.wait(BEAT):
            count += 1
            with contextlib.suppress(InputError):  # the next may come through
                self._client.put(NAME, self._named(count))

    def _named(self, count: int) -> bytes:
        own = _Other(platform.node(), os.getpid())
        return json.dumps({"id": self._id, "count": count, **vars(own)}).encode()


@dataclass(frozen=True)
class _Other:
    machine: str = "unknown"
    process: int = 0

    @classmethod
    def read(cls, name: bytes) -> "_Other":
        try:
            said = json.loads(name)
            return cls(str(said["machine"]), int(said["process"]))
        except (ValueError, TypeError, KeyError):  # not written by us: it is watched like any other
            return cls()

    @property
    def is_dead(self) -> bool:
        """Whether it was a process of this machine that is no more: then nobody need wait."""
        if self.machine != platform.node() or self.process <= 0:
            return False
        if self.process == os.getpid():  # the one before it in a container, where numbers begin anew
            return True
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return True
        except OSError:  # another user's
            return False
        return False

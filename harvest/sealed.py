"""While a model is loaded, no program is started, and a model on disk makes no connection.

transformers and TransformerLens run pip, download kernels or ask the hub where a file or library is missing:
`Gemma3ForConditionalGeneration` without its processor's files had torchvision installed, and with it another torch.
"""

import contextlib
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

from huggingface_hub import constants

PROGRAMS = ("subprocess.Popen", "os.system", "os.posix_spawn", "os.exec", "os.spawn", "os.fork", "os.forkpty")
NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg")
"""Audit events, see https://docs.python.org/3/library/audit_events.html."""
_forbidden: set[str] = set()


@contextlib.contextmanager
def sealed(network: bool) -> Iterator[None]:
    """Until the block ends, a program that is to be started raises PermissionError; a connection too, unless `network`.

    Of all threads: weights are read by several.
    """
    _install()
    before, offline = set(_forbidden), constants.HF_HUB_OFFLINE
    _forbidden.update(PROGRAMS if network else PROGRAMS + NETWORK)
    constants.HF_HUB_OFFLINE = offline or not network  # else the hub's client tries for half a minute
    try:
        yield
    finally:
        _forbidden.intersection_update(before)
        constants.HF_HUB_OFFLINE = offline


@cache
def _install() -> None:
    """Once: an audit hook cannot be taken off."""
    sys.addaudithook(_refuse)


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if event in _forbidden:
        what = "start a program" if event in PROGRAMS else "make a connection"
        raise PermissionError(
            f"a library wanted to {what} while the model is loaded ({event} {arguments!r:.120})"
        )

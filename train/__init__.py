"""Train nested transcoders on an activation store."""

import os
from typing import TYPE_CHECKING, Any

import common  # noqa: F401 - it answers Ctrl-C while the rest is imported

if TYPE_CHECKING:
    from transcoder.transcoder import Transcoder

__all__ = ["Transcoder"]

# Large tensors on 2 MB pages: a step of layer 17's recipe took 1.11 instead of 1.23 s on one thread.
# PyTorch reads this before its first large tensor; Linux only, elsewhere without effect.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def __getattr__(name: str) -> Any:
    """`Transcoder`, when it is first asked for: importing torch takes 2 s, --help and a typo need not wait for it."""
    if name != "Transcoder":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from transcoder.transcoder import Transcoder

    return Transcoder

"""The transcoder: what training produces and every other stage reads. `Transcoder.load(path)` opens one."""

from typing import TYPE_CHECKING, Any

import common  # noqa: F401 - it answers Ctrl-C while the rest is imported

if TYPE_CHECKING:
    from transcoder.transcoder import Transcoder

__all__ = ["Transcoder"]


def __getattr__(name: str) -> Any:
    """`Transcoder`, when it is first asked for: importing torch takes 2 s, --help and a typo need not wait for it."""
    if name != "Transcoder":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from transcoder.transcoder import Transcoder

    return Transcoder

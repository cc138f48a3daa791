"""The activation store: open it with `Store.open(path)`."""

from typing import TYPE_CHECKING, Any

import common  # noqa: F401 - it answers Ctrl-C while the rest is imported

if TYPE_CHECKING:
    from shards.loader import Batch, Loader
    from shards.store import Found, RowTokens, Store, StoreSplit

__all__ = ["Batch", "Found", "Loader", "RowTokens", "Store", "StoreSplit"]


def __getattr__(name: str) -> Any:
    """The names of `__all__`, when they are first asked for: they import torch, which takes 2 s."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from shards import loader, store

    return getattr(loader if hasattr(loader, name) else store, name)

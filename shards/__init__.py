"""The activation store: open it with `Store.open(path)`."""

from shards.loader import Batch, Loader
from shards.store import Store, StoreSplit

__all__ = ["Batch", "Loader", "Store", "StoreSplit"]

"""A split's contexts, written as they come."""

import hashlib
from pathlib import Path

import numpy as np

from common.files import write_whole
from shards.encode import encode_shard
from shards.layout import FILE_CHUNKS, contexts_array
from shards.manifest import digest


class ContextWriter:
    """Appends a split's contexts file by file; bounded memory whatever their number."""

    def __init__(self, root: Path, split: str, context_length: int) -> None:
        self._root, self._array = root, contexts_array(split, 0, context_length)
        self._pending: list[np.ndarray] = []
        self._digests: list[str] = []
        self.contexts = 0

    def append(self, context: np.ndarray) -> None:
        """Take in one context, [T] token ids."""
        self._pending.append(context)
        self.contexts += 1
        if len(self._pending) == FILE_CHUNKS * self._array.chunk[0]:
            self._flush()

    def _flush(self) -> None:
        values = np.stack(self._pending).astype(self._array.dtype)
        write_whole(self._root / self._array.file(len(self._digests)), encode_shard(self._array, values))
        self._digests.append(hashlib.sha256(values.tobytes()).hexdigest())
        self._pending = []

    def finish(self) -> str:
        """Write what is pending; returns the digest of all contexts."""
        if self._pending:
            self._flush()
        return digest(self._digests)

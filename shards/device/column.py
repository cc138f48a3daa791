"""One side of a window on the model's device: rows are put there, quantised there, and come to the host as int8.

Shapes: n rows of a window, c chunks of it, d columns.
"""

import numpy as np
import torch
from torch import Tensor

from shards.device.copies import Copies, Mark
from shards.encode import Measured, measure
from shards.layout import CHUNK_ROWS, SHARD_ROWS
from shards.storage import Encoded, Storage

AT_ONCE = 1 << 23
"""Values that are quantised together, 64 MiB in float64: of width 2,304, three chunks. Five such arrays are held."""
HELD = (torch.float32, torch.bfloat16, torch.float16)


def device_bytes(width: int, itemsize: int) -> int:
    """Of the device's memory that one side takes: a window's values, its int8 in parts and whole, the one before's."""
    return SHARD_ROWS * width * (itemsize + 3)


class Landing:
    """The host's memory that one side of a layer's windows is copied to, one window after the other."""

    def __init__(self, copies: Copies) -> None:
        self.copies = copies
        self._buffers: dict[str, Tensor] = {}

    def buffer(self, name: str, like: Tensor) -> Tensor:
        """Pinned, of the tensor's shape. Allocated for the first window: only the last ones are shorter."""
        held = self._buffers.get(name)
        if held is None or len(held) < len(like):
            held = self._buffers[name] = self.copies.pinned(like.shape, like.dtype)
        return held[: len(like)]


class DeviceColumn:
    """Rows [n, d] of one side: `put`, `quantise`, `fetch` by the model's thread; then `wait` and `chunk` by any.

    None of the first three makes the host wait for the device.
    """

    def __init__(self, rows: int, width: int, landing: Landing) -> None:
        self.shape = rows, width
        self._landing = landing
        self._values: Tensor | None = None
        self._results: dict[str, Tensor] = {}
        self._arrays: dict[str, np.ndarray] = {}
        self._computed = self._copied = Mark(None)

    def __len__(self) -> int:
        return self.shape[0]

    def put(self, places: Tensor, rows: Tensor) -> None:
        """Rows [m, d] at `places` [m] int64, all on the device; rows of one type, which is held."""
        if rows.dtype not in HELD:
            rows = rows.float()
        if self._values is None:
            self._values = torch.empty(self.shape, dtype=rows.dtype, device=rows.device)
        self._values.index_copy_(0, places, rows)

    def quantise(self, storage: Storage) -> None:
        """Have the device compute what is stored of the rows, and let go of them."""
        values, self._values = self._values, None
        assert values is not None, "rows are put before they are quantised"
        whole = len(self) // CHUNK_ROWS
        step = max(1, AT_ONCE // (CHUNK_ROWS * self.shape[1]))
        parts: list[dict[str, Tensor]] = []
        for first in range(0, whole, step):
            last = min(first + step, whole)
            here = values[first * CHUNK_ROWS : last * CHUNK_ROWS]
            parts.append(_computed(here.view(last - first, CHUNK_ROWS, -1), storage))
        if len(self) % CHUNK_ROWS:
            parts.append(_computed(values[None, whole * CHUNK_ROWS :], storage))
        self._results = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        self._computed = self._landing.copies.mark()

    def fetch(self) -> None:
        """Have the results copied to the host. The window before must not be read any more: it had the same place."""
        landed = {name: self._landing.buffer(name, result) for name, result in self._results.items()}
        pairs = [(landed[name], result) for name, result in self._results.items()]
        self._copied = self._landing.copies.start(pairs, self._computed)
        self._arrays = {name: tensor.numpy() for name, tensor in landed.items()}

    def wait_computed(self) -> None:
        """Until the device has quantised the rows: until the model has been run over them."""
        self._computed.wait()

    def wait_copied(self) -> None:
        """Until the results are on the host."""
        self._copied.wait()
        self._results = {}

    def unfinite(self) -> np.ndarray:
        """Numbers of the rows that hold NaN or infinity."""
        return np.flatnonzero(~self._arrays["finite"])

    def chunk(self, rows: slice) -> Measured:
        """A chunk of the rows, as `measure` gives it."""
        number, arrays = rows.start // CHUNK_ROWS, self._arrays
        encoded = Encoded(
            arrays["stored"][rows],
            arrays["scales"][number],
            arrays["row_scales"][rows],
            arrays["offsets"][number],
        )
        return Measured(encoded, *arrays["sums"][number])


def _computed(values: Tensor, storage: Storage) -> dict[str, Tensor]:
    """What is stored of chunks [c, n, d], and their sums; rows one after the other, [c n, d]."""
    values = values.float()
    encoded, *sums = measure(values, storage)
    return {
        "stored": encoded.stored.flatten(0, 1),
        "scales": encoded.scales,
        "row_scales": encoded.row_scales.flatten(),
        "offsets": encoded.offsets,
        "sums": torch.stack(sums, dim=1),
        "finite": torch.isfinite(values).all(-1).flatten(),
    }

"""Copies between the host's memory and a device, beside what the device computes.

A device of CUDA gets a stream for them, and pinned memory, without which they would wait. Any other device runs them in
order, where they are asked for.
"""

from collections.abc import Iterable

import torch
from torch import Tensor


def sent(values: Tensor, device: torch.device) -> Tensor:
    """A few numbers of the host, on the device, without waiting for what it computes; itself where that is the host."""
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


class Mark:
    """A point in what a device does, which others wait for."""

    def __init__(self, event: torch.cuda.Event | None) -> None:
        self._event = event

    def wait(self) -> None:
        """The calling thread waits until the device is past it."""
        if self._event is not None:
            self._event.synchronize()

    def precede(self, stream: torch.cuda.Stream | None) -> None:
        """What is asked of `stream` from now on begins after it; nobody waits here."""
        if self._event is not None and stream is not None:
            stream.wait_event(self._event)


class Copies:
    """The copies to and from one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def pinned(self, shape: Iterable[int], dtype: torch.dtype) -> Tensor:
        """Uninitialised memory of the host that the device copies from and to by itself."""
        return torch.empty(*shape, dtype=dtype, pin_memory=self._stream is not None)

    def mark(self) -> Mark:
        """Where the device's computing is, as asked for so far by this thread."""
        return self._mark(None if self._stream is None else torch.cuda.current_stream(self.device))

    def start(self, pairs: Iterable[tuple[Tensor, Tensor]], after: Mark) -> Mark:
        """Copy of each pair the second into the first, once the device is past `after`; returns the end.

        All these tensors must stay until then: the device's allocator does not know of this stream.
        """
        after.precede(self._stream)
        with torch.cuda.stream(self._stream):
            for to, source in pairs:
                to.copy_(source, non_blocking=True)
        return self._mark(self._stream)

    def compute_after(self, mark: Mark) -> None:
        """What this thread asks the device to compute from now on begins after the mark."""
        if self._stream is not None:
            mark.precede(torch.cuda.current_stream(self.device))

    @staticmethod
    def _mark(stream: torch.cuda.Stream | None) -> Mark:
        if stream is None:
            return Mark(None)
        event = torch.cuda.Event(blocking=True)  # a thread that waits sleeps
        event.record(stream)
        return Mark(event)

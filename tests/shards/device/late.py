"""Copies that happen as late as the code allows: whoever does not wait for one finds what was there before."""

from collections.abc import Callable, Iterable

from torch import Tensor

from shards.device.copies import Copies, Mark


class LateMark(Mark):
    """A copy that is made when somebody waits for it."""

    def __init__(self, copy: Callable[[], object]) -> None:
        super().__init__(None)
        self._copy: Callable[[], object] | None = copy

    def wait(self) -> None:
        if self._copy is not None:
            copy, self._copy = self._copy, None
            copy()


class LateCopies(Copies):
    """In the place of a stream that is slow."""

    def start(self, pairs: Iterable[tuple[Tensor, Tensor]], after: Mark) -> Mark:
        pairs = list(pairs)

        def copy() -> None:
            for to, source in pairs:
                to.copy_(source)

        return LateMark(copy)

    def compute_after(self, mark: Mark) -> None:
        mark.wait()

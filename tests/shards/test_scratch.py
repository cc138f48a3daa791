"""The bounded room where windows wait for their upload."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from shards.objects.scratch import Scratch


def test_a_full_scratch_says_that_it_waits_and_only_then(tmp_path: Path) -> None:
    scratch, waits = Scratch(tmp_path, 10), threading.Event()

    @contextmanager
    def waiting() -> Iterator[None]:
        waits.set()
        yield

    scratch.take(10, waiting)
    assert not waits.is_set()
    with ThreadPoolExecutor(1) as pool:
        taken = pool.submit(scratch.take, 4, waiting)
        assert waits.wait(60)
        assert not taken.done()
        scratch.give_back(4)
        taken.result(60)

"""Memory of an evaluation against the number of rows."""

from pathlib import Path

from tests import memory
from tests.evaluate.runs import arguments, make_run


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """Once its buffers are full: 2^20 waiting entries and a sample of 65,536 rows. 16 bytes kept of each of 140,000
    further rows would be 2.1 MiB.
    """
    make_run(tmp_path, heldout=300_000)
    few, many = (
        memory.of_evaluation(*arguments(tmp_path, "--evaluate.rows", str(rows)))
        for rows in (160_000, 300_000)
    )
    assert many < few + 2, (few, many)

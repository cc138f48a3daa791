"""Memory of an evaluation against the number of rows."""

import shutil
from pathlib import Path

import pytest

from tests import memory
from tests.evaluate.runs import arguments, make_run


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """Once its buffers are full: 2^20 waiting entries and a sample of 65,536 rows. 16 bytes kept of each of 340,000
    further rows would be 5.2 MiB. Equal runs differ by up to 4, so the smaller of two is taken.
    """
    make_run(tmp_path, heldout=500_000)

    def peak(rows: int) -> float:
        for folder in [*tmp_path.rglob("evaluation*")]:
            shutil.rmtree(folder, ignore_errors=True)
        return memory.of_evaluation(*arguments(tmp_path, "--evaluate.rows", str(rows)))

    few, many = (min(peak(rows), peak(rows)) for rows in (160_000, 500_000))
    assert many < few + 4, (few, many)

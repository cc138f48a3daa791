"""Memory that does not grow with the rows, and batches that are well mixed."""

from pathlib import Path

import numpy as np
import pytest

from tests.fixtures import make_store
from tests.memory import of_loader
from tests.shards.test_store import random_rows


@pytest.mark.slow
def test_the_loaders_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    grown = []
    for rows in (80_000, 240_000):  # two groups of chunks fill both buffers
        path = make_store(
            tmp_path / f"{rows}.zarr", random_rows(rows, 64, 64), random_rows(1, 64, 64), "int8"
        ).path
        grown.append(of_loader(path))
    assert grown[1] < grown[0] + 5  # MB, at three times the rows: 20 MB more of stored bytes


def test_batches_mix_like_independent_draws(tmp_path: Path) -> None:
    """Distinct contexts in a batch of 1,024, against draws from the whole split: at least 90 %."""
    store = make_store(
        tmp_path / "s.zarr", random_rows(400_000, 2, 2), random_rows(1, 2, 2), context_length=128
    )
    context = store.train.provenance(0, len(store.train))[0]
    batches = [len(np.unique(context[batch.rows])) for batch in store.train.loader(1024).batches()]
    rng = np.random.default_rng(0)
    drawn = [len(np.unique(context[rng.integers(0, len(context), 1024)])) for _ in range(50)]
    assert np.mean(batches) >= 0.9 * np.mean(drawn)

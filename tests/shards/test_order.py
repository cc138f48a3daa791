import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shards.order import chunk_groups, permutation


@given(st.integers(0, 3000), st.lists(st.integers(0, 2**63), max_size=3))
def test_is_a_permutation(n: int, key: list[int]) -> None:
    assert (np.sort(permutation(n, *key)) == np.arange(n)).all()


def test_the_order_of_rows_and_chunks_never_changes() -> None:
    """Golden: a store's bytes and a run's batches hang on these."""
    assert permutation(10, 0, 1).tolist() == [9, 4, 1, 7, 5, 8, 0, 6, 3, 2]
    assert chunk_groups(10, 4, seed=0, epoch=0).tolist() == [[0, 7, 8, 2], [5, 9, 4, 6]]


def test_keys_matter_in_order_and_number() -> None:
    orders = {tuple(permutation(50, *key)) for key in [(), (0,), (0, 0), (1,), (0, 1), (1, 0), (2**40,)]}
    assert len(orders) == 7


def test_leftover_chunks_differ_between_epochs() -> None:
    left = {tuple(sorted(set(range(37)) - set(chunk_groups(37, 32, 0, e).ravel()))) for e in range(5)}
    assert len(left) == 5

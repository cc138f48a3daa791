"""(seed, ...) -> order: pure functions, the same on every machine and with every library version."""

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""2^64 over the golden ratio, odd: SplitMix64's increment."""


def mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): a bijection on 64-bit integers, [n] uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permutation(n: int, *key: int) -> np.ndarray:
    """[n] int64 permutation of 0 to n - 1 that depends only on n and the integers of `key`.

    A store's bytes need an order that never changes. numpy promises none for `Generator.permutation` across versions.

    >>> permutation(5, 0).tolist(), permutation(5, 1).tolist()
    ([2, 0, 3, 1, 4], [2, 4, 0, 3, 1])
    """
    state = np.zeros(1, np.uint64)
    for part in key:
        state = mix(state + GOLDEN + np.uint64(part))
    draws = mix(state + GOLDEN * np.arange(1, n + 1, dtype=np.uint64))
    return np.argsort(draws, kind="stable")


def chunk_groups(chunks: int, group: int, seed: int, epoch: int) -> np.ndarray:
    """[chunks // group, group] chunk numbers: an epoch's order, cut into groups. The remainder is left out.

    >>> chunk_groups(chunks=5, group=2, seed=0, epoch=0).shape
    (2, 2)
    """
    return permutation(chunks, seed, epoch)[: chunks - chunks % group].reshape(-1, group)

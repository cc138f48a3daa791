"""(seed, ...) -> order. Pure, and the same on every machine and library version."""

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): a bijection on 64-bit integers."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permutation(n: int, *key: int) -> np.ndarray:
    """[n] int64 permutation of 0..n-1 that depends on nothing but n and the integers of `key`.

    numpy promises no stable stream of `Generator.permutation` across versions; a store's bytes need one.
    """
    state = np.zeros(1, np.uint64)
    for part in key:
        state = _mix(state + _GOLDEN + np.uint64(part))
    draws = _mix(state + _GOLDEN * np.arange(1, n + 1, dtype=np.uint64))
    return np.argsort(draws, kind="stable")


def chunk_groups(chunks: int, group: int, seed: int, epoch: int) -> np.ndarray:
    """[chunks // group, group] chunk numbers: an epoch's order, cut into groups; the remainder is left out."""
    return permutation(chunks, seed, epoch)[: chunks - chunks % group].reshape(-1, group)

"""A random permutation of ``range(n)`` that is computed at any place, in O(1) memory.

A Feistel network (Luby & Rackoff 1988) permutes the 2^(2h) numbers of 2h bits; applied again until the
value falls below n (cycle walking, Black & Rogaway 2002, "Ciphers with arbitrary finite domains") it
permutes ``range(n)``. The domain has at most 4n numbers (4 for n = 1), so few walks are needed.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from cllm.text.hashing import derive, mix64

ROUNDS = 6


@lru_cache(maxsize=8)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(derive("permutation", seed, epoch, r) for r in range(ROUNDS))


def permute(positions: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Where the permutation chosen by (seed, epoch) sends ``positions``, an int64 array within [0, n)."""
    assert positions.size
    assert 0 <= positions.min() <= positions.max() < n
    half = max(1, -(-(n - 1).bit_length() // 2))
    keys = _round_keys(seed, epoch)
    result = _feistel(positions.astype(np.uint64), half, keys)
    while (outside := np.flatnonzero(result >= n)).size:
        result[outside] = _feistel(result[outside], half, keys)
    return result.astype(np.int64)


def _feistel(values: np.ndarray, half: int, keys: tuple[int, ...]) -> np.ndarray:
    bits, low = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> bits, values & low
    for key in keys:
        left, right = right, left ^ (mix64(right, key) & low)
    return (left << bits) | right

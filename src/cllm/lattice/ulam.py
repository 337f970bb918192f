"""The Ulam spiral (Ulam 1963; Stein, Ulam & Wells, Amer. Math. Monthly 71, 1964): n ↔ (x, y), exact.

1 lies at the origin, 2 at (1, 0), 3 at (1, 1), and the spiral turns anticlockwise.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cllm.lattice.integers import magnitude

LIMIT = 2**62
# Below this a correctly rounded square root never rounds up to the next integer.
_EXACT_ROOT = 2**52
# Numbers worked on together: the scratch of a chunk stays in the second-level cache.
_CHUNK = 1 << 14


def ulam(n: Any) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (x, y) of n, each of n's shape; int64, O(1) a number, for 1 ≤ n < 2^62.

    Raises:
        ValueError: not integers, or out of range.
    """
    n = _integers(n, "n")
    largest = int(n.max()) if n.size else 0
    if n.size and not (int(n.min()) >= 1 and largest < LIMIT):
        raise ValueError(f"n of shape {n.shape} must lie in [1, 2^62)")
    flat = np.ascontiguousarray(n.reshape(-1), dtype=np.int64)
    x, y = np.empty_like(flat), np.empty_like(flat)
    big = largest > _EXACT_ROOT
    # Every value on the way is below n: narrow integers double what an instruction does, and AVX2 has
    # neither products nor maxima of wide ones.
    narrow = largest < 2**31
    scratch = _Scratch(min(_CHUNK, len(flat)), np.dtype(np.int32 if narrow else np.int64))
    for start in range(0, len(flat), _CHUNK):
        part = slice(start, start + _CHUNK)
        scratch.place(flat[part], x[part], y[part], big)
    return x.reshape(n.shape), y.reshape(n.shape)


class _Scratch:
    """Buffers of one chunk, used again for the next."""

    def __init__(self, size: int, integer: np.dtype) -> None:
        self.root = np.empty(size)
        self.k, self.m, self.u, self.v = np.empty((4, size), dtype=integer)

    def place(self, n: np.ndarray, x: np.ndarray, y: np.ndarray, big: bool) -> None:
        """With k = n - 1 and m = ⌊√k⌋: from the corner at m² go m steps up (m odd) or down (m
        even), then on to the left or right."""
        root, k, m, u, v = (b[: len(n)] for b in (self.root, self.k, self.m, self.u, self.v))
        np.copyto(k, n, casting="unsafe")
        np.subtract(k, 1, out=k)
        np.copyto(root, k)
        np.sqrt(root, out=root)
        np.copyto(m, root, casting="unsafe")
        if big:
            m -= m * m > k
            m += (m + 1) * (m + 1) <= k
        np.multiply(m, m, out=u)
        np.subtract(k, u, out=u)
        # Of these u steps past m², the first m are up or down: y = ±(min(u, m) - ⌊m/2⌋), and with
        # ⌈m/2⌉ = m - ⌊m/2⌋, x = ±(⌈m/2⌉ - max(u - m, 0)) = ±(y + m - u).
        np.minimum(u, m, out=v)
        np.right_shift(m, 1, out=k)
        np.subtract(v, k, out=v)
        np.subtract(m, u, out=u)
        np.add(u, v, out=u)
        # +1 on odd m, -1 on even
        np.bitwise_and(m, 1, out=m)
        np.left_shift(m, 1, out=m)
        np.subtract(m, 1, out=m)
        np.multiply(u, m, out=u)
        np.multiply(v, m, out=v)
        np.copyto(x, u)
        np.copyto(y, v)


def ulam_number(x: Any, y: Any) -> np.ndarray:
    """The n at (x, y); inverse of ``ulam``, int64 of the broadcast shape.

    Raises:
        ValueError: not integers, or |x| or |y| above 2^30, which every n < 2^62 keeps to.
    """
    x, y = np.broadcast_arrays(_integers(x, "x"), _integers(y, "y"))
    x, y = x.astype(np.int64), y.astype(np.int64)
    # Before the absolute values: that of the least int64 is negative.
    if x.size and max(magnitude(x), magnitude(y)) > 2**30:
        raise ValueError(f"coordinates of shape {x.shape} must be at most 2^30 in size")
    ring = np.maximum(np.abs(x), np.abs(y))
    square = 4 * ring * ring
    bottom = square + 3 * ring + x
    left = square + ring - y
    top = square - ring - x
    right = square - 3 * ring + y
    k = np.where(y == -ring, bottom, np.where(x == -ring, left, np.where(y == ring, top, right)))
    return k + 1


def _integers(value: Any, name: str) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} of shape {array.shape} must hold integers below 2^63")
    if array.dtype == np.uint64 and array.size and int(array.max()) >= LIMIT:
        raise ValueError(f"{name} of shape {array.shape} must be below 2^62")
    return array

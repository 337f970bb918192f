"""The Ulam spiral (Ulam 1963; Stein, Ulam & Wells, Amer. Math. Monthly 71, 1964): n ↔ (x, y), exact.

1 lies at the origin, 2 at (1, 0), 3 at (1, 1), and the spiral turns anticlockwise.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cllm.lattice.integers import magnitude

LIMIT = 2**62
# Numbers worked on together: the scratch of a chunk stays in the second-level cache.
_CHUNK = 1 << 14


def ulam(n: Any) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (x, y) of n, each of n's shape; int64, O(1) a number, for 1 ≤ n < 2^62.

    Raises:
        ValueError: not integers, or out of range.
    """
    n = _integers(n, "n")
    flat = np.ascontiguousarray(n.reshape(-1), dtype=np.int64)
    x, y = np.empty_like(flat), np.empty_like(flat)
    scratch: dict[bool, _Scratch] = {}
    for start in range(0, len(flat), _CHUNK):
        part = slice(start, start + _CHUNK)
        # Of all bits together the sign and the highest say as much as the extremes, in half the time.
        bits = int(np.bitwise_or.reduce(flat[part]))
        narrow = 0 <= bits < 2**31
        if narrow not in scratch:
            scratch[narrow] = _Scratch(min(_CHUNK, len(flat)), narrow)
        if not 0 <= bits < LIMIT or not scratch[narrow].place(flat[part], x[part], y[part]):
            raise ValueError(f"n of shape {n.shape} must lie in [1, 2^62)")
    return x.reshape(n.shape), y.reshape(n.shape)


class _Scratch:
    """Buffers of one chunk, used again for the next.

    Narrow integers double what an instruction does, and AVX2 has neither products nor maxima of wide
    ones. Every value on the way is at most n in size.
    """

    def __init__(self, size: int, narrow: bool) -> None:
        integer, real = (np.int32, np.float32) if narrow else (np.int64, np.float64)
        self.k, self.m, self.u, self.v = np.empty((4, size), dtype=integer)
        self.root = self.v.view(real)
        # NumPy takes a scalar's minimum three times as slowly as an array's.
        self.zero = np.zeros(size, dtype=integer)

    def place(self, n: np.ndarray, x: np.ndarray, y: np.ndarray) -> bool:
        """With k = n - 1 and m = ⌊√k⌋: from the corner at m² go m steps up (m odd) or down (m even),
        then on to the left or right. False where an n is 0, and the rest undefined.

        Rounding never makes m too small: with unit roundoff ε, k ≥ j² is at least j²(1 - ε) as a float
        and at least j² where j is a power of two, so that its root is below j by less than half a
        float's step, and rounds to j or more. It may make m one too large, where k is little below a
        corner; then it is so many steps back from there.
        """
        buffers = self.k, self.m, self.u, self.v, self.root, self.zero
        k, m, u, v, root, zero = (b[: len(n)] for b in buffers)
        np.copyto(k, n, casting="unsafe")
        np.subtract(k, 1, out=k)
        if k.min() < 0:
            return False
        np.copyto(root, k, casting="unsafe")
        np.sqrt(root, out=root)
        np.copyto(m, root, casting="unsafe")
        np.multiply(m, m, out=u)
        np.subtract(k, u, out=u)
        # Of these u steps past m², v = min(max(u, 0), m) are up or down, the others left or right, and
        # the corner is at ±(⌈m/2⌉, -⌊m/2⌋).
        np.minimum(u, m, out=v)
        np.maximum(v, zero, out=v)
        np.subtract(u, v, out=u)
        np.abs(u, out=u)
        np.right_shift(m, 1, out=k)
        np.subtract(v, k, out=v)
        np.subtract(m, k, out=k)
        np.subtract(k, u, out=u)
        # +1 on odd m, -1 on even
        np.bitwise_and(m, 1, out=m)
        np.left_shift(m, 1, out=m)
        np.subtract(m, 1, out=m)
        np.multiply(u, m, out=u)
        np.multiply(v, m, out=v)
        np.copyto(x, u)
        np.copyto(y, v)
        return True


def ulam_number(x: Any, y: Any) -> np.ndarray:
    """The n at (x, y); inverse of ``ulam``, int64 of the broadcast shape.

    Raises:
        ValueError: not integers, or |x| or |y| above 2^30, which every n < 2^62 keeps to.
    """
    x, y = np.broadcast_arrays(_integers(x, "x"), _integers(y, "y"))
    # Before the absolute values: that of the least int64 is negative.
    if x.size and max(magnitude(x), magnitude(y)) > 2**30:
        raise ValueError(f"coordinates of shape {x.shape} must be at most 2^30 in size")
    flat_x, flat_y = x.reshape(-1), y.reshape(-1)
    out = np.empty(x.size, dtype=np.int64)
    # In chunks, whose temporaries stay in cache: fresh pages for them would cost several times the work.
    for start in range(0, len(out), _CHUNK):
        part = slice(start, start + _CHUNK)
        out[part] = _number(flat_x[part].astype(np.int64), flat_y[part].astype(np.int64))
    return out.reshape(x.shape)


def _number(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """By the side of the square of side 2·ring that (x, y) lies on."""
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

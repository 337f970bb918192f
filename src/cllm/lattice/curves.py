"""Other orders of the plane: golden spiral, Morton and Hilbert curves. All are vectorised over n."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cllm.lattice.ulam import _integers

# round(2^64·(3-√5)/2): the golden angle in turns.
_GOLDEN_TURN = np.uint64(0x61C8864680B583EA)

# Interleaving two coordinates of 31 bits fills 62.
_COORDINATE_LIMIT = 2**31

_SPREAD = (
    (16, 0x0000FFFF0000FFFF),
    (8, 0x00FF00FF00FF00FF),
    (4, 0x0F0F0F0F0F0F0F0F),
    (2, 0x3333333333333333),
    (1, 0x5555555555555555),
)


def golden(n: Any) -> tuple[np.ndarray, np.ndarray]:
    """Phyllotaxis: n ≥ 0 at radius √n and angle n·π(3-√5) (Vogel, Math. Biosciences 44, 1979).

    Every point has about area π; float64 (x, y) of n's shape, right to 0.001 up to n = 2^36. Beyond, the
    error grows as n^1.5.
    """
    n = _checked(n, "n", 2**53)
    # Products of uint64 wrap, which leaves the fraction of a turn in all its 64 bits.
    angle = (n.astype(np.uint64) * _GOLDEN_TURN) * (2 * math.pi / 2**64)
    radius = np.sqrt(n)
    return radius * np.cos(angle), radius * np.sin(angle)


def morton(n: Any) -> tuple[np.ndarray, np.ndarray]:
    """Z-order (Morton 1966): x from the even bits of 0 ≤ n < 2^62, y from the odd ones."""
    n = _checked(n, "n", 2**62)
    return _compact(n), _compact(n >> 1)


def morton_number(x: Any, y: Any) -> np.ndarray:
    """Inverse of ``morton`` for 0 ≤ x, y < 2^31."""
    x, y = (_checked(c, name, _COORDINATE_LIMIT) for c, name in ((x, "x"), (y, "y")))
    return _spread(x) | (_spread(y) << 1)


def hilbert(n: Any, order: int) -> tuple[np.ndarray, np.ndarray]:
    """Hilbert's curve on a 2^order square (Hilbert 1891): 0 ≤ n < 4^order, order ≤ 31.

    Consecutive numbers are neighbouring cells. One pass for each pair of bits.
    """
    _check_order(order)
    n = _checked(n, "n", 4**order)
    x, y = np.zeros_like(n), np.zeros_like(n)
    for level in range(order):
        digit = n >> 2 * level
        right = digit >> 1 & 1
        up = (digit ^ right) & 1
        x, y = _turn(x, y, right, up, 1 << level)
        x += right << level
        y += up << level
    return x, y


def hilbert_number(x: Any, y: Any, order: int) -> np.ndarray:
    """Inverse of ``hilbert`` for 0 ≤ x, y < 2^order."""
    _check_order(order)
    x, y = (_checked(c, name, 2**order) for c, name in ((x, "x"), (y, "y")))
    x, y = (c.copy() for c in np.broadcast_arrays(x, y))
    n = np.zeros_like(x)
    for level in reversed(range(order)):
        right, up = x >> level & 1, y >> level & 1
        n += (3 * right ^ up) << 2 * level
        x, y = x & (1 << level) - 1, y & (1 << level) - 1
        x, y = _turn(x, y, right, up, 1 << level)
    return n


def _turn(
    x: np.ndarray, y: np.ndarray, right: np.ndarray, up: np.ndarray, side: int
) -> tuple[np.ndarray, np.ndarray]:
    """The quadrant's own orientation: the two lower ones are mirrored on a diagonal."""
    flip = (right == 1) & (up == 0)
    x, y = np.where(flip, side - 1 - x, x), np.where(flip, side - 1 - y, y)
    return np.where(up == 0, y, x), np.where(up == 0, x, y)


def _spread(value: np.ndarray) -> np.ndarray:
    out = value.astype(np.int64)
    for shift, mask in _SPREAD:
        out = (out | out << shift) & mask
    return out


def _compact(value: np.ndarray) -> np.ndarray:
    out = value.astype(np.int64) & _SPREAD[-1][1]
    masks = [mask for _, mask in _SPREAD[-2::-1]] + [0x00000000FFFFFFFF]
    for (shift, _), mask in zip(_SPREAD[::-1], masks, strict=True):
        out = (out | out >> shift) & mask
    return out


def _check_order(order: int) -> None:
    if isinstance(order, bool) or not isinstance(order, int) or not 1 <= order <= 31:
        raise ValueError(f"order must be an integer in [1, 31], got {order!r}")


def _checked(value: Any, name: str, limit: int) -> np.ndarray:
    array = _integers(value, name)
    if array.size and not (int(array.min()) >= 0 and int(array.max()) < limit):
        raise ValueError(f"{name} of shape {array.shape} must lie in [0, {limit})")
    return array.astype(np.int64)

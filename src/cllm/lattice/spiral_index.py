"""A numbered set laid out in the plane, searched by place."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from cllm.lattice.check import positive_int
from cllm.lattice.curves import golden, hilbert, morton
from cllm.lattice.ulam import ulam

LAYOUTS = ("ulam", "golden", "morton", "hilbert")
# Positions and tree take some 50 bytes an item.
COUNT_LIMIT = 10**8


class SpiralIndex:
    """Items 0 … count-1 (a vocabulary by frequency rank, say) on a spiral or curve.

    Args:
        count: number of items, up to ``COUNT_LIMIT``.
        layout: ``ulam`` (item i is the number i + 1), ``golden``, ``morton`` or ``hilbert``.

    Attributes:
        positions: (count, 2) float64.
    """

    def __init__(self, count: int, layout: str = "ulam") -> None:
        count = positive_int(count, "count")
        if count > COUNT_LIMIT:
            raise ValueError(f"count of {count} items is beyond the limit {COUNT_LIMIT}")
        if layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
        n = np.arange(count)
        if layout == "ulam":
            x, y = ulam(n + 1)
        elif layout == "golden":
            x, y = golden(n)
        elif layout == "morton":
            x, y = morton(n)
        else:
            x, y = hilbert(n, max(1, (count - 1).bit_length() + 1 >> 1))
        self.layout = layout
        self.positions = np.column_stack([x, y]).astype(np.float64)

    @cached_property
    def _tree(self) -> Any:
        """Made at the first search: a layout may want the positions alone."""
        from scipy.spatial import cKDTree

        return cKDTree(self.positions)

    def __len__(self) -> int:
        return len(self.positions)

    def nearest(self, points: Any, k: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest items of every point (m, 2): items (m, k) int64 and distances (m, k),
        ascending by distance and then by number; k is at most ``len``.

        Raises:
            ValueError: wrong shape, NaN or infinity, or k out of range.
        """
        points = _points(points)
        k = positive_int(k, "k")
        if k > len(self):
            raise ValueError(f"k = {k} is more than the {len(self)} items")
        # The tree breaks ties as it likes: take everything as far as the k-th, then order it.
        reach = self._tree.query(points, k=[k])[0][:, 0]
        items = np.empty((len(points), k), dtype=np.int64)
        distances = np.empty((len(points), k))
        rows = self._tree.query_ball_point(points, reach * (1 + 1e-12))
        for i, row in enumerate(rows):
            found = np.asarray(row)
            away = np.linalg.norm(self.positions[found] - points[i], axis=1)
            order = np.lexsort((found, away))[:k]
            items[i], distances[i] = found[order], away[order]
        return items, distances

    def within(self, centre: Any, radius: float) -> np.ndarray:
        """Items within ``radius`` of one point (2,), ascending.

        Raises:
            ValueError: not one finite point, or a radius that is negative or NaN.
        """
        if not radius >= 0:
            raise ValueError(f"radius must not be negative, got {radius}")
        found = self._tree.query_ball_point(_point(centre), radius)
        return np.sort(np.asarray(found, dtype=np.int64))

    def box(self, low: Any, high: Any) -> np.ndarray:
        """Items with low ≤ (x, y) ≤ high, each (2,), ascending.

        Raises:
            ValueError: not two finite points.
        """
        low, high = _point(low), _point(high)
        inside = ((self.positions >= low) & (self.positions <= high)).all(axis=1)
        return np.flatnonzero(inside)


def _points(points: Any) -> np.ndarray:
    array = np.asarray(points, dtype=np.float64)
    if array.ndim not in (1, 2) or array.shape[-1] != 2:
        raise ValueError(f"points must have shape (m, 2) or (2,), got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"points of shape {array.shape} have NaN or infinity")
    return array.reshape(-1, 2)


def _point(point: Any) -> np.ndarray:
    if np.shape(point) != (2,):
        raise ValueError(f"a point must have shape (2,), got {np.shape(point)}")
    return _points(point)[0]

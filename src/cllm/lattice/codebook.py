"""A finite set of lattice points with a number for each: ``point(index)`` and ``index(point)``."""

from __future__ import annotations

from typing import Any

import numpy as np

# Odd multipliers of a linear hash modulo 2^64; a clash is seen when the codebook is built.
_HASH_SEED = 24


class Codebook:
    """Lattice points in canonical order: by norm, then lexicographically by coordinates.

    So the points of a ball keep their numbers in every larger ball, and a shell is a slice.

    Args:
        integers: (count, n) distinct integer coordinates, in units of ``unit``.
        unit: length of one integer step.
    """

    def __init__(self, integers: np.ndarray, unit: float) -> None:
        squares = (integers * integers).sum(axis=1)
        order = np.lexsort((*integers.T[::-1], squares))
        self._points = np.ascontiguousarray(integers[order])
        self._squares = squares[order]
        self.unit = unit
        rng = np.random.default_rng(_HASH_SEED)
        self._multipliers = rng.integers(1, 2**62, integers.shape[1], dtype=np.int64) * 2 + 1
        hashes = self._hash(self._points)
        self._by_hash = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._by_hash]
        if len(np.unique(self._hashes)) != len(self._hashes):
            raise ValueError(f"points of shape {integers.shape} are not distinct")

    def __len__(self) -> int:
        return len(self._points)

    def _hash(self, integers: np.ndarray) -> np.ndarray:
        return (integers * self._multipliers).sum(axis=1)

    @property
    def shells(self) -> dict[float, int]:
        """Squared norm -> number of points, ascending: the start of the theta series."""
        squares, counts = np.unique(self._squares, return_counts=True)
        return {float(s) * self.unit**2: int(c) for s, c in zip(squares, counts, strict=True)}

    def shell(self, squared_norm: float) -> Codebook:
        """The points of one squared norm (relative tolerance 1e-6) as a codebook of its own."""
        wanted = round(squared_norm / self.unit**2)
        picked = self._points[self._squares == wanted]
        if len(picked) == 0 or abs(wanted * self.unit**2 - squared_norm) > 1e-6 * squared_norm:
            raise ValueError(f"no points of squared norm {squared_norm}; there are {self.shells}")
        return Codebook(picked, self.unit)

    def point(self, index: Any) -> np.ndarray:
        """Points (..., n) float64 for integer indices (...).

        Raises:
            ValueError: not integers, or outside [0, len).
        """
        index = np.asarray(index)
        if index.dtype.kind not in "iu":
            raise ValueError(f"indices of shape {index.shape} must be integers, not {index.dtype}")
        if index.size and not (index.min() >= 0 and index.max() < len(self)):
            raise ValueError(f"indices of shape {index.shape} must lie in [0, {len(self)})")
        return self._points[index] * self.unit

    def index(self, points: Any) -> np.ndarray:
        """Indices (m,) of points (m, n), each within 1e-3 steps of a point of the codebook.

        Raises:
            ValueError: wrong shape, or a point that is not in the codebook; names the first.
        """
        points = np.asarray(points, dtype=np.float64)
        n = self._points.shape[1]
        if points.ndim not in (1, 2) or points.shape[-1] != n:
            raise ValueError(f"points must have shape (m, {n}) or ({n},), got {points.shape}")
        rows = points.reshape(-1, n) / self.unit
        if not (np.abs(rows) < 2.0**31).all():
            raise ValueError(f"points of shape {points.shape} are not finite or out of range")
        integers = np.rint(rows).astype(np.int64)
        place = np.searchsorted(self._hashes, self._hash(integers)).clip(max=len(self) - 1)
        found = self._by_hash[place]
        wrong = (self._points[found] != integers).any(axis=1)
        wrong |= (np.abs(rows - integers) > 1e-3).any(axis=1)
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            raise ValueError(f"point {row} of shape {points.shape} is not in the codebook")
        return found.reshape(points.shape[:-1])

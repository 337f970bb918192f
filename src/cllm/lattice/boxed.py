"""Exact closest vectors with bounded coefficients: Schnorr–Euchner search of many targets in step."""

from __future__ import annotations

import numpy as np

# Searches that have ended are dropped from the batch every so many steps.
COMPACT_EVERY = 64


def boxed_closest(
    L: np.ndarray, y: np.ndarray, low: np.ndarray, high: np.ndarray, start: np.ndarray
) -> np.ndarray:
    """Closest points with low ≤ x ≤ high, exactly (Schnorr & Euchner 1994; Agrell, Eriksson, Vardy &
    Zeger, "Closest point search in lattices", IEEE Trans. Inf. Theory 48, 2002, section III).

    Every target is a depth-first search of its own, and all advance one node a step, so that a step
    is a handful of array operations. A reduced basis would move the box, so the basis is taken as
    it is: time grows exponentially in n.

    Args:
        L: (n, n) lower triangular, B = L Q.
        y: (m, n) targets in the frame of Q.
        low, high: (n,) integer bounds.
        start: (m, n) coefficients inside the box; their distances are the first radius.

    Returns:
        (m, n) float64 coefficients.
    """
    search = _Search(L, y, low.astype(np.float64), high.astype(np.float64), start)
    steps = 0
    while search.step():
        steps += 1
        if steps % COMPACT_EVERY == 0:
            search.compact()
    return search.best


class _Search:
    def __init__(
        self, L: np.ndarray, y: np.ndarray, low: np.ndarray, high: np.ndarray, start: np.ndarray
    ) -> None:
        m, n = y.shape
        self.L, self.low, self.high, self.r = L, low, high, np.diagonal(L)
        self.columns = np.ascontiguousarray(L.T)
        self.best = start.astype(np.float64)
        self.radius = ((y - self.best @ L) ** 2).sum(axis=1)
        self.y = y
        self.ids = np.arange(m)
        self.level = np.full(m, n - 1)
        self.x = np.zeros((m, n))
        self.centre = np.zeros((m, n))
        self.left = np.zeros((m, n))
        self.right = np.zeros((m, n))
        # partial[:, k] is the squared distance of the rows from k on.
        self.partial = np.zeros((m, n + 1))
        self._enter(np.arange(m))

    def _enter(self, rows: np.ndarray) -> None:
        """Take the nearest allowed integer of the level just entered."""
        k = self.level[rows]
        decided = np.arange(self.L.shape[0]) > k[:, None]
        pull = np.einsum("ij,ij->i", np.where(decided, self.x[rows], 0.0), self.columns[k])
        centre = (self.y[self.ids[rows], k] - pull) / self.r[k]
        x = np.clip(np.rint(centre), self.low[k], self.high[k])
        self.centre[rows, k], self.x[rows, k] = centre, x
        self.left[rows, k], self.right[rows, k] = x - 1, x + 1

    def _sibling(self, rows: np.ndarray) -> None:
        """The next integer by distance from the centre; infinity when the box is exhausted."""
        k = self.level[rows]
        centre, left, right = self.centre[rows, k], self.left[rows, k], self.right[rows, k]
        to_left = np.where(left >= self.low[k], centre - left, np.inf)
        to_right = np.where(right <= self.high[k], right - centre, np.inf)
        go_left = to_left < to_right
        none = np.isinf(np.minimum(to_left, to_right))
        self.x[rows, k] = np.where(none, np.inf, np.where(go_left, left, right))
        self.left[rows, k] = left - go_left
        self.right[rows, k] = right + ~go_left

    def step(self) -> bool:
        """One node for every search that is still open; False when none is."""
        n = len(self.r)
        rows = np.flatnonzero(self.level < n)
        if rows.size == 0:
            return False
        k, ids = self.level[rows], self.ids[rows]
        gap = self.r[k] * (self.x[rows, k] - self.centre[rows, k])
        distance = self.partial[rows, k + 1] + gap * gap
        inside = distance < self.radius[ids]
        leaf = inside & (k == 0)
        if leaf.any():
            self.radius[ids[leaf]] = distance[leaf]
            self.best[ids[leaf]] = self.x[rows[leaf]]
        down = rows[inside & (k > 0)]
        self.partial[rows, k] = distance
        self.level[down] -= 1
        self._enter(down)
        # A leaf's siblings are farther than the leaf: after it, as after a miss, the search goes up.
        up = rows[~inside | leaf]
        self.level[up] += 1
        self._sibling(up[self.level[up] < n])
        return True

    def compact(self) -> None:
        """Forget searches that have ended, once they are half of the batch."""
        keep = self.level < len(self.r)
        if keep.sum() * 2 > len(keep):
            return
        for name in ("ids", "level", "x", "centre", "left", "right", "partial"):
            setattr(self, name, getattr(self, name)[keep])

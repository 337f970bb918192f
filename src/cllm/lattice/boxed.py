"""Exact closest vectors with bounded coefficients: Schnorr–Euchner search of many targets in step."""

from __future__ import annotations

import numpy as np

from cllm.lattice.enumeration import expected_nodes

# A step of a few searches takes some 100 µs and a node two steps: beyond this many expected nodes of
# one target the batch takes minutes.
NODE_LIMIT = 2e6
# Random descents from each of the farthest targets, where the heuristic refuses.
PROBES = 2000
PROBED = 16

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

    Raises:
        ValueError: the expected number of nodes of a target is beyond ``NODE_LIMIT``.
    """
    nodes = expected_boxed_nodes(L, y, low, high, start)
    if nodes > NODE_LIMIT:
        raise ValueError(
            f"exact search of a box in dimension {len(L)} would visit about {nodes:.1e} nodes for one"
            " target: use method='k-best' with a larger K"
        )
    search = _Search(L, y, low.astype(np.float64), high.astype(np.float64), start)
    steps = 0
    while search.step():
        steps += 1
        if steps % COMPACT_EVERY == 0:
            search.compact()
    return search.best


def expected_boxed_nodes(
    L: np.ndarray, y: np.ndarray, low: np.ndarray, high: np.ndarray, start: np.ndarray
) -> float:
    """Expected nodes of the target of y (m, n) that has most, with ``start``'s distances for radii.

    The Gaussian heuristic, which for targets outside the box is far too high, since most of the ball
    is outside, too. So what it would refuse is probed, and the smaller figure counts. Probing alone
    would not do: in high dimension nearly all nodes lie below a few that no probe meets.
    """
    distances = np.linalg.norm(y - start @ L, axis=1)
    farthest = float(distances.max(initial=0.0))
    if farthest == 0.0:
        return 0.0
    nodes = expected_nodes(np.log(np.diagonal(L)), farthest, high - low + 1)
    if nodes <= NODE_LIMIT:
        return nodes
    picked = np.argsort(-distances, kind="stable")[:PROBED]
    return min(nodes, float(_probe(L, y[picked], low, high, distances[picked]).max()))


def _probe(
    L: np.ndarray, y: np.ndarray, low: np.ndarray, high: np.ndarray, radius: np.ndarray
) -> np.ndarray:
    """Unbiased estimates (m,) of the nodes within ``radius`` (m,): the mean over random descents of
    the sums of the products of the numbers of children (Knuth, "Estimating the efficiency of
    backtrack programs", Math. Comp. 29, 1975)."""
    rng = np.random.default_rng(0)
    y = np.repeat(y, PROBES, axis=0)
    left = np.repeat(radius, PROBES) ** 2
    X, weight, total = np.zeros_like(y), np.ones(len(y)), np.zeros(len(y))
    for k in range(len(L) - 1, -1, -1):
        centre = (y[:, k] - X[:, k + 1 :] @ L[k + 1 :, k]) / L[k, k]
        reach = np.sqrt(np.maximum(left, 0.0)) / L[k, k]
        first = np.maximum(low[k], np.ceil(centre - reach))
        children = np.maximum(np.minimum(high[k], np.floor(centre + reach)) - first + 1, 0.0)
        weight *= children
        total += weight
        # Where there is no child the weight is zero, and the rest of the descent counts for nothing.
        X[:, k] = np.where(children > 0, first + np.floor(rng.random(len(y)) * children), 0.0)
        left -= (L[k, k] * (X[:, k] - centre)) ** 2
    return total.reshape(-1, PROBES).mean(axis=1)


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

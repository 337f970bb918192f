"""A query's way through the cells: the most promising first, and on until the answer is proved."""

from __future__ import annotations

import numpy as np

from cllm.infer.lookup.best import Best, pick
from cllm.infer.lookup.metric import Rows, keys_in_place
from cllm.infer.lookup.regions import Regions

_FIRST = 1 << 13
"""Rows looked at between two looks at the k-th best key; doubled each time."""
_TELLS = 0.25
"""Where bounds leave more rows than this share, computing the keys of all is cheaper."""
SKIMMED = 32
"""One row in so many is looked at in full, of those whose leading coordinates are, and so many times k
at least."""


class Search:
    """One query on its way; ``best`` is what it has seen so far."""

    def __init__(
        self, query: np.ndarray, rows: Rows, regions: Regions, k: int, metric: str, reach: float
    ) -> None:
        self.query, self.rows, self.regions, self.metric = query, rows, regions, metric
        self.best = Best(query, rows, k, metric, reach)
        # Bounds add up rotated coordinates, which have been rounded once more, and l2's the query's
        # own square.
        own = float(query @ query) if metric == "l2" else 0.0
        self.slack = 8 * self.best.error + 2.0**-20 * (len(query) + 16) * own

    def go(self, q: np.ndarray, cells: np.ndarray, *, exact: bool, skim: bool) -> None:
        """Look at ``cells`` (ascending): at what promises most of them, at all, or exactly, on until no
        other row can be among the best. ``q`` is the rotated query."""
        if exact or not skim:
            self.visit(cells)
        else:
            self.skim(q, cells)
        if exact:
            self.prove(q, cells)

    def visit(self, cells: np.ndarray) -> None:
        """Look at all rows of ``cells`` (ascending)."""
        pieces = runs(self.regions.starts, cells)
        keys = np.empty(sum(piece.stop - piece.start for piece in pieces), dtype=np.float32)
        done = 0
        for piece in pieces:
            end = done + piece.stop - piece.start
            np.dot(self.rows.vectors[piece], self.query, out=keys[done:end])
            keys_in_place(keys[done:end], self.rows, piece, self.metric)
            done = end
        self.best.offer(keys, pieces)

    def skim(self, q: np.ndarray, cells: np.ndarray) -> None:
        """Look at the rows of ``cells`` (ascending) whose leading coordinates promise most."""
        pieces = runs(self.regions.starts, cells)
        share = likely_share(len(q) - self.regions.head.shape[1])
        keys = self.regions.row_keys(q, cells, pieces, self.rows, self.metric, share)
        count = max(len(keys) // SKIMMED, SKIMMED * self.best.k)
        if count >= len(keys) // 2:
            self.visit(cells)
            return
        places = np.argpartition(keys, len(keys) - count)[-count:]
        self._offer_rows(pick(pieces, np.sort(places)))

    def prove(self, q: np.ndarray, seen: np.ndarray) -> None:
        """Look at whatever else could be among the best; ``q`` is the rotated query, ``seen`` are the
        cells that were visited."""
        bound = self.regions.bound(q, self.metric)
        bound[seen] = -np.inf
        order = np.argsort(-bound, kind="stable")[: len(bound) - len(seen)]
        ends = self.regions.sizes[order].cumsum()
        start, batch, bounds_tell = 0, _FIRST, True
        while start < len(order) and bound[order[start]] >= self._needed():
            before = ends[start - 1] if start else 0
            end = max(int(np.searchsorted(ends, before + batch)), start + 1)
            cells = order[start:end]
            cells = np.sort(cells[bound[cells] >= self._needed()])
            if bounds_tell:
                bounds_tell = self._visit_by_bounds(q, cells)
            else:
                self.visit(cells)
            start, batch = end, 2 * batch

    def _needed(self) -> float:
        return self.best.least - self.slack

    def _visit_by_bounds(self, q: np.ndarray, cells: np.ndarray) -> bool:
        """``visit``, but for rows whose own bound rules them out; whether that spared enough."""
        pieces = runs(self.regions.starts, cells)
        bounds = self.regions.row_keys(q, cells, pieces, self.rows, self.metric, 1.0)
        able = np.flatnonzero(bounds >= self._needed())
        if len(able) > _TELLS * len(bounds):
            self.visit(cells)
            return False
        if len(able):
            self._offer_rows(pick(pieces, able))
        return True

    def _offer_rows(self, numbers: np.ndarray) -> None:
        products = self.rows.vectors[numbers] @ self.query
        self.best.offer_rows(keys_in_place(products, self.rows, numbers, self.metric), numbers)


def likely_share(others: int) -> float:
    """Two standard deviations of what coordinates other than the leading ones add to a key, as a share of
    the most that they can, were their directions random."""
    return 2 / max(others, 4) ** 0.5


def runs(starts: np.ndarray, cells: np.ndarray) -> list[slice]:
    """The rows of ascending ``cells`` (one at least) as few slices: neighbours are one."""
    breaks = np.flatnonzero(np.diff(cells) != 1) + 1
    first = starts[cells[np.concatenate([[0], breaks])]]
    last = starts[cells[np.concatenate([breaks - 1, [len(cells) - 1]])] + 1]
    return [slice(a, b) for a, b in zip(first.tolist(), last.tolist(), strict=True)]


def most_promising(promise: np.ndarray, sizes: np.ndarray, k: int, budget: int) -> np.ndarray:
    """The cells (ascending) of highest ``promise`` that hold ``budget`` rows together, and k at
    least."""
    wanted = max(budget, k)
    count = min(int(2 * wanted / sizes.mean()) + 8, len(promise))
    while True:
        best = np.argpartition(-promise, count - 1)[:count]
        best = best[np.argsort(-promise[best], kind="stable")]
        total = sizes[best].cumsum()
        if total[-1] >= wanted or count == len(promise):
            return np.sort(best[: int(np.searchsorted(total, wanted)) + 1])
        count = min(2 * count, len(promise))

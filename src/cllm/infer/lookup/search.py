"""A query's way through the cells: the most promising first, and on until the answer is proved."""

from __future__ import annotations

import numpy as np

from cllm.infer.lookup.metric import Rows, keys_in_place, kth_largest_at_least, rounding, settle
from cllm.infer.lookup.regions import Regions

_FIRST = 1 << 13
"""Rows looked at between two looks at the k-th best key; doubled each time."""
_TELLS = 0.25
"""Where bounds leave more rows than this share, computing the keys of all is cheaper."""


class Search:
    """One query's state: which rows were seen, and the keys of those that may be among the best."""

    def __init__(
        self, query: np.ndarray, rows: Rows, regions: Regions, k: int, metric: str, reach: float
    ) -> None:
        self.query, self.rows, self.regions = query, rows, regions
        self.k, self.metric = k, metric
        self.error = rounding(query, reach, metric)
        # Bounds add up rotated coordinates, which have been rounded once more, and l2's the query's own
        # square.
        own = float(query @ query) if metric == "l2" else 0.0
        self.slack = 8 * self.error + 2.0**-20 * (len(query) + 16) * own
        self.found: list[np.ndarray] = []
        self.keys: list[np.ndarray] = []
        self.least = -np.inf

    def visit(self, cells: np.ndarray) -> None:
        """Look at all rows of ``cells`` (ascending)."""
        pieces = runs(self.regions.starts, cells)
        products = np.empty(sum(piece.stop - piece.start for piece in pieces), dtype=np.float32)
        done = 0
        for piece in pieces:
            end = done + piece.stop - piece.start
            np.dot(self.rows.vectors[piece], self.query, out=products[done:end])
            keys_in_place(products[done:end], self.rows, piece, self.metric)
            done = end
        self._keep(products, pieces)

    def prove(self, q: np.ndarray, seen: np.ndarray) -> None:
        """Look at whatever else could be among the best; ``q`` is the rotated query, ``seen`` are the
        cells that were visited."""
        bound = self.regions.bound(q, self.metric)
        bound[seen] = -np.inf
        order = np.argsort(-bound, kind="stable")
        sizes = self.regions.sizes[order].cumsum()
        start, batch, bounds_tell = 0, _FIRST, True
        while start < len(order) and bound[order[start]] >= self.least - self.slack:
            base = sizes[start - 1] if start else 0
            end = max(int(np.searchsorted(sizes, base + batch)), start + 1)
            cells = order[start:end]
            cells = np.sort(cells[bound[cells] >= self.least - self.slack])
            if bounds_tell:
                bounds_tell = self._visit_by_bounds(q, cells)
            else:
                self.visit(cells)
            start, batch = end, 2 * batch

    def answer(self) -> tuple[np.ndarray, np.ndarray]:
        """The k best (ids, scores) of what was seen."""
        found, keys = np.concatenate(self.found), np.concatenate(self.keys)
        found = found[keys >= self.least - 2 * self.error]
        return settle(self.query, self.rows, found, self.k, self.metric)

    def _visit_by_bounds(self, q: np.ndarray, cells: np.ndarray) -> bool:
        """``visit``, but for rows whose own bound rules them out; whether that spared enough."""
        pieces = [slice(self.regions.starts[c], self.regions.starts[c + 1]) for c in cells]
        bounds = self.regions.row_bounds(q, cells, pieces, self.rows, self.metric)
        able = np.flatnonzero(bounds >= self.least - self.slack)
        if len(able) > _TELLS * len(bounds):
            self.visit(cells)
            return False
        able = row_numbers(pieces)[able]
        products = self.rows.vectors[able] @ self.query
        keys = keys_in_place(products, self.rows, able, self.metric)
        self._add(able, keys)
        return True

    def _keep(self, keys: np.ndarray, pieces: list[slice]) -> None:
        """Of the keys of ``pieces``, remember those that may count."""
        if len(keys) >= self.k:
            self.least = max(self.least, kth_largest_at_least(keys, self.k))
        able = np.flatnonzero(keys >= self.least - 2 * self.error)
        self._add(row_numbers(pieces)[able], keys[able])

    def _add(self, found: np.ndarray, keys: np.ndarray) -> None:
        self.found.append(found)
        self.keys.append(keys)
        known = np.concatenate(self.keys)
        if len(known) >= self.k:
            least = np.partition(known, len(known) - self.k)[-self.k]
            self.least = max(self.least, float(least))


def runs(starts: np.ndarray, cells: np.ndarray) -> list[slice]:
    """The rows of ascending ``cells`` as few slices: cells that follow each other are one."""
    breaks = np.flatnonzero(np.diff(cells) != 1) + 1
    first = cells[np.concatenate([[0], breaks])] if len(cells) else cells
    last = cells[np.concatenate([breaks - 1, [len(cells) - 1]])] if len(cells) else cells
    return [
        slice(a, b) for a, b in zip(starts[first].tolist(), starts[last + 1].tolist(), strict=True)
    ]


def row_numbers(pieces: list[slice]) -> np.ndarray:
    """The numbers of the rows of ``pieces``, in order."""
    if not pieces:
        return np.empty(0, dtype=np.int64)
    return np.concatenate([np.arange(piece.start, piece.stop) for piece in pieces])


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

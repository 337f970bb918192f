"""The best rows so far, as float32 keys let them be told."""

from __future__ import annotations

import numpy as np

from cllm.infer.lookup.metric import Rows, rounding, settle

_GROUP = 16


class Best:
    """Collects, for one query, every row whose key is within rounding of the k-th best key.

    ``least`` is a key that at least k of the offered rows reach; ``error`` bounds a key's rounding.
    """

    def __init__(self, query: np.ndarray, rows: Rows, k: int, metric: str, reach: float) -> None:
        self.query, self.rows, self.k, self.metric = query, rows, k, metric
        self.error = rounding(query, reach, metric)
        self.least = -np.inf
        self._found: list[np.ndarray] = []
        self._keys: list[np.ndarray] = []

    def offer(self, keys: np.ndarray, pieces: list[slice]) -> None:
        """``keys`` of the rows of ``pieces``, in order; no row may be offered twice."""
        if len(keys) >= self.k:
            self.least = max(self.least, kth_largest_at_least(keys, self.k))
        able = np.flatnonzero(keys >= self.least - 2 * self.error)
        if len(able):
            self.offer_rows(keys[able], pick(pieces, able))

    def offer_rows(self, keys: np.ndarray, numbers: np.ndarray) -> None:
        """``keys`` of the rows ``numbers``."""
        self._found.append(numbers)
        self._keys.append(keys)
        known = np.concatenate(self._keys)
        if len(known) >= self.k:
            least = np.partition(known, len(known) - self.k)[-self.k]
            self.least = max(self.least, float(least))

    def answer(self) -> tuple[np.ndarray, np.ndarray]:
        """The k best (ids, scores), settled in float64."""
        found, keys = np.concatenate(self._found), np.concatenate(self._keys)
        found = found[keys >= self.least - 2 * self.error]
        return settle(self.query, self.rows, found, self.k, self.metric)


def kth_largest_at_least(keys: np.ndarray, k: int) -> float:
    """A number that at least k of ``keys`` (v,) reach, close to the k-th largest of them.

    The k-th largest of maxima of small groups: one pass that vectorises, where partitioning all keys
    would not.
    """
    if len(keys) >= 4 * k * _GROUP:
        whole = len(keys) // _GROUP * _GROUP
        keys = keys[:whole].reshape(_GROUP, -1).max(axis=0)
    return float(np.partition(keys, len(keys) - k)[-k])


def pick(pieces: list[slice], places: np.ndarray) -> np.ndarray:
    """Row numbers of ascending ``places`` in the rows of ``pieces`` laid end to end."""
    sizes = np.array([piece.stop - piece.start for piece in pieces])
    ends = sizes.cumsum()
    firsts = np.array([piece.start for piece in pieces]) - (ends - sizes)
    return np.asarray(places + firsts[np.searchsorted(ends, places, side="right")])

"""The plain scan: every row's key by matrix products."""

from __future__ import annotations

import numpy as np

from cllm.infer.lookup.best import Best
from cllm.infer.lookup.metric import Rows, keys_in_place

_QUERIES, _ROWS = 64, 1 << 16
"""A block of keys is no larger than their product (16 MiB)."""


def scan(
    queries: np.ndarray, rows: Rows, k: int, metric: str, reach: float
) -> tuple[np.ndarray, np.ndarray]:
    """The k best (ids (n, k), scores (n, k)) of all rows for queries (n, D), exactly."""
    ids = np.empty((len(queries), k), dtype=np.int64)
    scores = np.empty((len(queries), k))
    for start in range(0, len(queries), _QUERIES):
        block = queries[start : start + _QUERIES]
        best = [Best(query, rows, k, metric, reach) for query in block]
        for first in range(0, len(rows.vectors), _ROWS):
            part = slice(first, min(first + _ROWS, len(rows.vectors)))
            vectors = rows.vectors[part]
            # A product with a vector runs at the memory's speed; one with a matrix of one row does not.
            keys = (vectors @ block[0])[None] if len(block) == 1 else block @ vectors.T
            keys = keys_in_place(keys, rows, part, metric)
            for mine, collected in zip(keys, best, strict=True):
                collected.offer(mine, [part])
        for i, collected in enumerate(best, start):
            ids[i], scores[i] = collected.answer()
    return ids, scores

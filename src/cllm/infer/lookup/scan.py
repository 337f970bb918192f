"""The plain scan: every row's key by one matrix product."""

from __future__ import annotations

import numpy as np

from cllm.infer.lookup.metric import Rows, keys_in_place, kth_largest_at_least, rounding, settle

_KEYS = 1 << 22
"""Keys held at once (16 MiB)."""


def scan(
    queries: np.ndarray, rows: Rows, k: int, metric: str, reach: float
) -> tuple[np.ndarray, np.ndarray]:
    """The k best (ids (n, k), scores (n, k)) of all rows for queries (n, D), exactly."""
    count = len(rows.vectors)
    ids = np.empty((len(queries), k), dtype=np.int64)
    scores = np.empty((len(queries), k))
    step = max(_KEYS // count, 1)
    for start in range(0, len(queries), step):
        block = queries[start : start + step]
        # A vector product is a pass at the memory's speed; as a matrix product of one row it is not.
        products = (rows.vectors @ block[0])[None] if len(block) == 1 else block @ rows.vectors.T
        keys = keys_in_place(products, rows, slice(None), metric)
        for i, query in enumerate(block):
            least = kth_largest_at_least(keys[i], k) - 2 * rounding(query, reach, metric)
            candidates = np.flatnonzero(keys[i] >= least)
            ids[start + i], scores[start + i] = settle(query, rows, candidates, k, metric)
    return ids, scores

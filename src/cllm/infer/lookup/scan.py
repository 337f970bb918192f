"""The plain scan: every row's key by matrix products."""

from __future__ import annotations

import numpy as np
import torch

from cllm.infer.lookup.best import Best
from cllm.infer.lookup.metric import Rows, exact_scores, keys_in_place, rounding

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
        if len(rows.vectors) <= _ROWS:
            part = slice(start, start + len(block))
            ids[part], scores[part] = _scan_small(block, rows, k, metric, reach)
            continue
        best = [Best(query, rows, k, metric, reach) for query in block]
        for first in range(0, len(rows.vectors), _ROWS):
            part = slice(first, min(first + _ROWS, len(rows.vectors)))
            vectors = rows.vectors[part]
            keys = keys_in_place(_products(block, vectors), rows, part, metric)
            for mine, collected in zip(keys, best, strict=True):
                collected.offer(mine, [part])
        for i, collected in enumerate(best, start):
            ids[i], scores[i] = collected.answer()
    return ids, scores


def _scan_small(
    queries: np.ndarray, rows: Rows, k: int, metric: str, reach: float
) -> tuple[np.ndarray, np.ndarray]:
    """The same for a table whose keys fit at once: what a query costs beside its product is shared by
    all. Queries with many keys within rounding of the k-th best are settled one by one."""
    keys = _products(queries, rows.vectors)
    keys_in_place(keys, rows, slice(None), metric)
    few = min(k + 8, len(rows.vectors))
    values, places = (t.numpy() for t in torch.topk(torch.from_numpy(keys), few, dim=1))
    scores = np.empty((len(queries), few))
    for i, query in enumerate(queries.astype(np.float64)):
        scores[i] = exact_scores(query, rows.vectors[places[i]], metric)
    ids = rows.ids[places].astype(np.int64)
    order = np.lexsort((ids, scores if metric == "l2" else -scores), axis=1)[:, :k]
    ids, scores = np.take_along_axis(ids, order, 1), np.take_along_axis(scores, order, 1)
    if few < len(rows.vectors):
        margin = values[:, k - 1] - values[:, -1]
        for i, query in enumerate(queries):
            if margin[i] <= 2 * rounding(query, reach, metric):
                best = Best(query, rows, k, metric, reach)
                best.offer(keys[i], [slice(0, len(rows.vectors))])
                ids[i], scores[i] = best.answer()
    return ids, scores


def _products(queries: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Inner products (n, V)."""
    # A product with a vector runs at the memory's speed; one with a matrix of one row does not.
    return (vectors @ queries[0])[None] if len(queries) == 1 else queries @ vectors.T

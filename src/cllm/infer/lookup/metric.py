"""What "close" means, and the exact scores of candidates.

Each metric orders the rows x of a table by a **key**, a·(q·x) + b with a and b of the row alone, so that
all three are read off one scan of inner products:

========  ==================  ============  ====================
metric    key                 a             b
========  ==================  ============  ====================
ip        q·x                 1             0
l2        q·x - ‖x‖²/2        1             -‖x‖²/2
cosine    q·x/‖x‖             1/‖x‖ (or 0)  0
========  ==================  ============  ====================

Keys are float32 and rounded; who has the best of them is settled in float64 among all rows whose keys
are within the rounding of the k-th best, ties by the lower id. So the answer does not depend on the way
in which rows were visited.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

METRICS = ("ip", "l2", "cosine")


@dataclass(frozen=True)
class Nearest:
    """Tokens closest to each of n queries, the closest first.

    Attributes:
        ids: int64 (n, k).
        scores: float64 (n, k): inner products, cosines, or for ``l2`` Euclidean distances.
        proved: bool (n,): whether the answer is shown to be that of a scan of all tokens.
    """

    ids: np.ndarray
    scores: np.ndarray
    proved: np.ndarray


@dataclass(frozen=True)
class Rows:
    """A table with what the metrics need of each row.

    Attributes:
        vectors: float32 (V, D).
        ids: int32 (V,), the token of each row.
        half: float32 (V,), ‖x‖²/2.
        inverse: float32 (V,), 1/‖x‖, and 0 for a row of zeros.
    """

    vectors: np.ndarray
    ids: np.ndarray
    half: np.ndarray
    inverse: np.ndarray

    @classmethod
    def of(cls, vectors: np.ndarray, ids: np.ndarray) -> Rows:
        """The rows of ``vectors`` under the names ``ids``."""
        norms = row_norms(vectors)
        inverse = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
        with np.errstate(over="ignore"):  # rows so long are refused
            half = (np.square(norms) / 2).astype(np.float32)
        return cls(vectors, ids.astype(np.int32), half, inverse.astype(np.float32))

    @property
    def reach(self) -> float:
        """The largest norm of a row."""
        return float(np.sqrt(2 * float(self.half.max())))


def row_norms(vectors: np.ndarray) -> np.ndarray:
    """Norms (V,) float64 of float32 rows, in blocks so that the table is not copied."""
    out = np.empty(len(vectors))
    for start in range(0, len(vectors), 1 << 14):
        block = vectors[start : start + (1 << 14)].astype(np.float64)
        out[start : start + len(block)] = np.sqrt(np.einsum("vd,vd->v", block, block))
    return out


def keys_in_place(products: np.ndarray, rows: Rows, where: Any, metric: str) -> np.ndarray:
    """Inner products (…, v) with rows ``where`` (slice or numbers) become their keys."""
    if metric == "l2":
        products -= rows.half[where]
    elif metric == "cosine":
        products *= rows.inverse[where]
    return products


def rounding(query: np.ndarray, reach: float, metric: str) -> float:
    """A bound of the error of a float32 key of ``query`` (D,), rows being no longer than ``reach``.

    Twice the usual bound of an inner product, D·u·‖q‖‖x‖ with u = 2⁻²⁴, and the rounding of a and b.
    """
    size = float(np.linalg.norm(query))
    scale = {"ip": size * reach, "l2": size * reach + reach**2, "cosine": size}[metric]
    return 2.0**-23 * (len(query) + 16) * scale + 1e-36


def settle(
    query: np.ndarray, rows: Rows, candidates: np.ndarray, k: int, metric: str
) -> tuple[np.ndarray, np.ndarray]:
    """The k best (ids, scores) of the rows ``candidates`` (distinct numbers), in float64."""
    q = query.astype(np.float64)
    scores = np.empty(len(candidates))
    for start in range(0, len(candidates), 1 << 14):
        some = candidates[start : start + (1 << 14)]
        scores[start : start + len(some)] = exact_scores(q, rows.vectors[some], metric)
    ids = rows.ids[candidates]
    best = np.lexsort((ids, scores if metric == "l2" else -scores))[:k]
    return ids[best].astype(np.int64), scores[best]


def exact_scores(q: np.ndarray, vectors: np.ndarray, metric: str) -> np.ndarray:
    """Scores (v,) of float32 rows for one float64 query; a cosine with a vector of zeros is 0."""
    x = vectors.astype(np.float64)
    if metric == "l2":
        x -= q
        return np.asarray(np.sqrt(np.einsum("vd,vd->v", x, x)))
    # The same order of additions for every row, whichever rows come with it.
    products = np.einsum("vd,d->v", x, q)
    if metric == "cosine":
        norms = np.sqrt(np.einsum("vd,vd->v", x, x)) * np.sqrt(q @ q)
        return np.asarray(np.divide(products, norms, out=np.zeros_like(products), where=norms > 0))
    return np.asarray(products)

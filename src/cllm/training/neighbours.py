"""The tokens whose codes are most similar to a token's, for all tokens of a vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cllm.text.token_codes import TokenCodes

_ROWS = 512
"""Rows of similarities at a time."""


@dataclass(frozen=True, eq=False)
class Neighbours:
    """Lists of the same length for each of V tokens.

    Attributes:
        ids: (V, k) int64.
        similarities: (V, k) float64, log gcd / log lcm of the two codes; 0 where a token has fewer than k
            tokens that it shares a piece with.
    """

    ids: np.ndarray
    similarities: np.ndarray

    @classmethod
    def of(
        cls,
        codes: TokenCodes,
        k: int,
        vocab_size: int,
        advance: Callable[[float], None] = lambda rows: None,
    ) -> Neighbours:
        """The ``k`` most similar to each token, the most similar first, itself left out.

        ``vocab_size``: rows of the table; those that the tokenizer does not have have no neighbours.
        ``advance`` is told of each block's rows. Time and not memory grow with V².
        """
        size = len(codes)
        k = min(k, size - 1)
        ids = np.zeros((vocab_size, k), dtype=np.int64)
        found = np.zeros((vocab_size, k))
        for start in range(0, size, _ROWS):
            block = np.arange(start, min(start + _ROWS, size))
            rows = codes.similarities(block)
            rows[np.arange(len(block)), block] = -1
            nearest = np.argpartition(-rows, k - 1, axis=1)[:, :k]
            scores = np.take_along_axis(rows, nearest, axis=1)
            order = np.lexsort((nearest, -scores), axis=1)
            ids[block] = np.take_along_axis(nearest, order, axis=1)
            found[block] = np.take_along_axis(scores, order, axis=1)
            advance(len(block))
        return cls(ids, found)

    def first(self, k: int) -> Neighbours:
        """The first ``k`` of each list."""
        return Neighbours(self.ids[:, :k], self.similarities[:, :k])

    def spread(self, counts: np.ndarray) -> np.ndarray:
        """What the neighbours get (V,) when each token hands them its count, times their similarity."""
        some = np.flatnonzero(counts)
        given = counts[some, None] * self.similarities[some]
        return np.bincount(self.ids[some].ravel(), weights=given.ravel(), minlength=len(self.ids))

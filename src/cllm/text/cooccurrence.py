"""How often one token follows another within a few places: windowed counts of a packed text.

The text is read once, in chunks, and the memory is bounded whatever its length and vocabulary: small
vocabularies are counted in a table of all pairs, large ones in a sparse matrix that drops its rarest
pairs where it would grow past the bound (as lossy counting does: Manku & Motwani 2002).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from scipy import sparse

from cllm.text.packed import PackedTokens

CHUNK = 1 << 22
"""Tokens read at a time, at most; a table of all pairs is gone over once for each chunk."""
MEMORY = 1 << 30
"""Bytes that counting may take."""
_ENTRY_BYTES = 24
"""Of a sparse entry: value and column, and again in the matrix that an addition makes."""
_PAIR_BYTES = 48
"""Of a pair before it is counted: its two ids, its weight, and copies of them while they are sorted."""


def harmonic_weights(window: int) -> tuple[float, ...]:
    """1, ½, ⅓, … for the places 1 … ``window``: near pairs weigh more (as in GloVe, Pennington et al.
    2014)."""
    return tuple(1.0 / place for place in range(1, window + 1))


def cooccurrence(
    tokens: PackedTokens,
    vocab_size: int,
    weights: Sequence[float],
    *,
    memory: int = MEMORY,
    say: Callable[[str], None] = lambda text: None,
) -> sparse.csr_array:
    """Counts of ordered pairs: a (V, V) float64 matrix F, F[i, j] = Σ_d weights[d − 1] · #{t: x_t = i,
    x_{t+d} = j}.

    The symmetric window of both sides is F + Fᵀ. The end token, which separates documents, is counted
    like any other, but no pair reaches across one. Places of weight 0 cost nothing. ``memory`` (bytes)
    bounds what counting takes; where pairs must be dropped for it, ``say`` is told once, at the end.
    """
    assert weights, "a window of no places"
    if 3 * 8 * vocab_size**2 <= memory:  # the sum, one count, and that count weighted
        return _dense(tokens, vocab_size, weights)
    # At least as many pairs as a window has, or nothing could be read.
    chunk = max(1, min(CHUNK, memory // 4 // (_PAIR_BYTES * len(weights))))
    return _sparse(tokens, vocab_size, weights, chunk, memory // 2 // _ENTRY_BYTES, say)


def _dense(tokens: PackedTokens, size: int, weights: Sequence[float]) -> sparse.csr_array:
    total = np.zeros(size * size)
    for place, first, second in _pairs(tokens, weights, CHUNK):
        total += weights[place] * np.bincount(first * size + second, minlength=size * size)
    return sparse.csr_array(total.reshape(size, size))


def _sparse(
    tokens: PackedTokens,
    size: int,
    weights: Sequence[float],
    chunk: int,
    most: int,
    say: Callable[[str], None],
) -> sparse.csr_array:
    """The same with at most about ``most`` entries."""
    total = sparse.csr_array((size, size))
    dropped, below = 0, 0.0
    for place, first, second in _pairs(tokens, weights, chunk):
        values = np.full(len(first), weights[place])
        total = total + sparse.coo_array((values, (first, second)), shape=(size, size)).tocsr()
        if total.nnz > most:
            # Down to half the bound, so that this happens seldom.
            bar = np.partition(total.data, total.nnz - most // 2)[total.nnz - most // 2]
            before = total.nnz
            total.data[total.data <= bar] = 0.0
            total.eliminate_zeros()
            dropped, below = dropped + before - total.nnz, max(below, float(bar))
    if dropped:
        say(
            f"co-occurrence: {dropped:,} rare pairs (counts up to {below:g}) were dropped to keep "
            "memory bounded"
        )
    return total


def _pairs(
    tokens: PackedTokens, weights: Sequence[float], chunk: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(place − 1, first ids, second ids), int64, of all pairs of each chunk and each place that weighs."""
    end_id, window = int(tokens.ids[0]), len(weights)
    places = [place for place, weight in enumerate(weights, start=1) if weight]
    for begin in range(0, len(tokens), chunk):
        ids = tokens.ids[begin : begin + chunk + window].astype(np.int64)
        ends = np.concatenate([[0], np.cumsum(ids == end_id)])
        for place in places:
            count = min(chunk, len(ids) - place)
            if count <= 0:
                continue
            # End tokens strictly between the two.
            inside = ends[place : place + count] == ends[1 : 1 + count]
            yield place - 1, ids[:count][inside], ids[place : place + count][inside]

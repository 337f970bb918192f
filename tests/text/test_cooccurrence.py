"""Windowed counts: equal to a loop over all pairs, however they are computed, and in bounded memory."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.text import cooccurrence as module
from cllm.text.cooccurrence import cooccurrence, harmonic_weights
from cllm.text.packed import PackedTokens

VOCABULARY = 11
TINY = 1
"""A bound on memory under which nothing is dense, and chunks are as short as they can be."""


def stream(inner: list[int]) -> PackedTokens:
    return PackedTokens.from_arrays(np.array([0, *inner, 0]), text_bytes=len(inner))


def naive(ids: np.ndarray, weights: tuple[float, ...]) -> np.ndarray:
    """Every pair, one at a time; none with an end token between."""
    found = np.zeros((VOCABULARY, VOCABULARY))
    for t in range(len(ids)):
        for place, weight in enumerate(weights, 1):
            if t + place >= len(ids):
                break
            found[ids[t], ids[t + place]] += weight
            if ids[t + place] == 0:
                break
    return found


streams = st.lists(st.integers(0, VOCABULARY - 1), max_size=60)
windows = st.lists(st.sampled_from([1.0, 0.5, 0.25, 0.0]), min_size=1, max_size=5).map(tuple)


@settings(deadline=None)
@given(streams, windows, st.integers(1, 70))
def test_counts_equal_a_naive_loop(
    inner: list[int], weights: tuple[float, ...], chunk: int
) -> None:
    tokens = stream(inner)
    expected = naive(tokens.ids, weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", chunk)
        np.testing.assert_array_equal(cooccurrence(tokens, VOCABULARY, weights).toarray(), expected)
        counted = module._sparse(tokens, VOCABULARY, weights, chunk, 10**6, print)
        np.testing.assert_array_equal(counted.toarray(), expected)


def test_little_memory_keeps_the_frequent_pairs_and_says_so() -> None:
    rng = np.random.default_rng(0)
    common = rng.choice([1, 2, 3], 6000)
    rare = rng.integers(4, 1000, 6000)
    inner = np.where(rng.random(6000) < 0.7, common, rare)
    tokens = PackedTokens.from_arrays(np.array([0, *inner, 0]), text_bytes=1)
    said: list[str] = []
    whole = cooccurrence(tokens, 1000, (1.0,))
    memory = 200 * 48
    small = cooccurrence(tokens, 1000, (1.0,), memory=memory, say=said.append)
    assert whole.nnz > 1000
    assert small.nnz <= memory // 48
    assert len(said) == 1
    assert "rare pairs" in said[0]
    nine = np.ix_([1, 2, 3], [1, 2, 3])
    np.testing.assert_array_equal(small.toarray()[nine], whole.toarray()[nine])


def test_no_memory_for_a_table_and_enough_for_the_pairs_gives_the_same_counts() -> None:
    inner = np.random.default_rng(1).integers(0, 300, 4000)
    tokens = PackedTokens.from_arrays(np.array([0, *inner, 0]), text_bytes=1)
    weights = harmonic_weights(4)
    said: list[str] = []
    sparse = cooccurrence(tokens, 300, weights, memory=2_000_000, say=said.append)
    dense = cooccurrence(tokens, 300, weights)
    assert not said
    np.testing.assert_allclose(sparse.toarray(), dense.toarray(), rtol=1e-12)


def test_nearer_pairs_weigh_more() -> None:
    assert harmonic_weights(4) == (1.0, 1 / 2, 1 / 3, 1 / 4)

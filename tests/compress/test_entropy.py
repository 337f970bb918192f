"""Integers through the entropy coder: exact, and near what they are worth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

pytest.importorskip("constriction")

from cllm.compress.codecs.entropy import (
    LARGEST,
    costs_like,
    decode_integers,
    encode_integers,
)
from cllm.compress.codecs.frame import Reader


@given(
    q=arrays.arrays(
        np.int64,
        st.tuples(st.integers(0, 9), st.integers(0, 9)),
        elements=st.one_of(
            st.integers(-3, 3), st.integers(-2000, 2000), st.integers(1 - LARGEST, LARGEST - 1)
        ),
    )
)
@settings(max_examples=60)
def test_integers_come_back(q):
    reader = Reader(encode_integers(q))
    back = decode_integers(reader, *q.shape)
    reader.end()
    assert np.array_equal(back, q)


def test_bits_are_near_the_entropy():
    rng = np.random.default_rng(0)
    spreads = np.geomspace(20, 0.3, 40)
    sizes = np.exp(rng.normal(0, 0.4, (2000, 1)))
    q = np.rint(rng.normal(size=(2000, 40)) * sizes * spreads).astype(np.int64)
    by_column = 0.0
    for column in q.T:
        counts = np.unique(column, return_counts=True)[1]
        by_column += counts @ np.log2(len(column) / counts)
    # Rows of unlike sizes are worth more than columns alone can see.
    assert 8 * len(encode_integers(q)) < by_column


def test_costs_foretell_the_bytes():
    rng = np.random.default_rng(0)
    q = np.rint(rng.laplace(size=(3000, 30)) * np.geomspace(8, 0.2, 30)).astype(np.int64)
    costs = costs_like(q)
    bits = sum(costs.bits(costs.classes[:, j], np.abs(q[:, j])).sum() for j in range(30))
    assert bits == pytest.approx(8 * len(encode_integers(q)), rel=0.05)


def test_bytes_are_pinned():
    """What was stored by one version is read by the next: the coder's arithmetic may not change."""
    q = np.arange(-12, 12).reshape(6, 4) * np.array([1, 3, 0, 40])
    data = encode_integers(q)
    assert np.array_equal(decode_integers(Reader(bytes.fromhex(PINNED)), 6, 4), q)
    assert data.hex() == PINNED


PINNED = "65720090140000007660af90ddc54dbf62a7b67355add9e22b126600"

"""The table that begins with the corpus's statistics: PPMI, its factors, and corpora of any size."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from cllm.model.corpus_start import corpus_table, ppmi, truncated_svd
from cllm.model.crystal_start import crystal_table
from cllm.text.merge_tree import MergeTree
from cllm.text.token_codes import TokenCodes

OCCURRENCES = np.arange(80)


def counts_of(size: int, seed: int = 0, share: float = 0.3) -> sparse.csr_array:
    rng = np.random.default_rng(seed)
    found = rng.integers(1, 50, (size, size)) * (rng.random((size, size)) < share)
    return sparse.csr_array(found.astype(float))


def test_ppmi_equals_its_formula() -> None:
    counts = counts_of(12, share=0.8)
    dense = counts.toarray()
    context = dense.sum(0) ** 0.75
    context /= context.sum()
    with np.errstate(divide="ignore"):
        wanted = np.log(dense / dense.sum(1, keepdims=True) / context) - 0.1
    wanted = np.maximum(wanted, 0.0)
    np.testing.assert_allclose(ppmi(counts, shift=0.1).toarray(), wanted, atol=1e-12)


@pytest.mark.parametrize("rank", [5, 40, 90])
def test_svd_equals_the_dense_one_with_fixed_signs(rank: int) -> None:
    matrix = ppmi(counts_of(60))
    left, values, right = truncated_svd(matrix, rank, seed=3)
    expected = np.linalg.svd(matrix.toarray(), compute_uv=False)[:rank]
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5)
    kept = min(rank, 60)
    assert left.shape == right.shape == (60, kept)
    np.testing.assert_allclose(left.T @ matrix @ right, np.diag(expected), atol=1e-3)
    assert (left.max(axis=0) >= -left.min(axis=0) - 1e-6).all()


def test_a_table_is_the_same_bits_for_a_seed() -> None:
    counts = counts_of(80, share=0.1)
    one = corpus_table(counts, OCCURRENCES, 8, std=0.02, seed=1)
    assert one.dtype == np.float32
    assert np.array_equal(one, corpus_table(counts, OCCURRENCES, 8, std=0.02, seed=1))


def test_statistics_of_a_low_rank_give_the_same_bits_each_time() -> None:
    """ARPACK asked for more than there is begins again from a vector that it draws."""
    few = counts_of(80).toarray() @ np.outer(np.ones(80), np.eye(80)[0])
    few[:, :12] += counts_of(80).toarray()[:, :12]
    matrix = sparse.csr_array(few)
    first, *others = (truncated_svd(matrix, 30, seed=1) for _ in range(3))
    for other in others:
        assert all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))
    np.testing.assert_allclose(first[1][12:], 0, atol=1e-3 * first[1][0])


def test_tokens_of_like_contexts_begin_near_each_other() -> None:
    rng = np.random.default_rng(0)
    # Two kinds of tokens, even and odd, that follow their own kind four times as often.
    same = np.add.outer(np.arange(60), np.arange(60)) % 2 == 0
    counts = sparse.csr_array(rng.poisson(np.where(same, 8.0, 2.0)).astype(float))
    table = corpus_table(counts, np.ones(60), 6, std=0.02, seed=0)
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    near = unit @ unit.T
    np.fill_diagonal(near, np.nan)
    assert np.nanmean(near[same]) > np.nanmean(near[~same]) + 0.2


def test_unseen_tokens_and_missing_directions_are_random_and_small() -> None:
    counts = counts_of(10).toarray()
    counts[:, 7] = counts[7, :] = 0
    table = corpus_table(sparse.csr_array(counts), counts.sum(0), 16, std=0.02, seed=0)
    assert table.shape == (10, 16)
    assert np.isfinite(table).all()
    assert table.std() == pytest.approx(0.02, rel=0.3)
    assert 0.005 < table[7].std() < 0.04, "the row of a token never seen"
    assert 0.005 < table[:, 12:].std() < 0.04, "columns beyond the rank of the statistics"


@pytest.mark.parametrize("counts", [np.zeros((5, 5)), np.eye(5), np.ones((5, 5))])
def test_statistics_that_say_nothing_leave_a_usable_table(counts: np.ndarray) -> None:
    table = corpus_table(sparse.csr_array(counts), np.ones(5), 4, std=0.02, seed=0)
    assert np.isfinite(table).all()
    assert 0.005 < table.std() < 0.05


def test_crystal_tokens_that_share_pieces_are_nearer() -> None:
    letters = list("abcdefghijklmnopqrstuvwxyz")
    vocab = [*letters, "yz"]  # one merge, of two letters
    model = {
        "type": "BPE",
        "vocab": {name: i for i, name in enumerate(vocab)},
        "merges": [["y", "z"]],
    }
    codes = TokenCodes.build(MergeTree.from_tokenizer({"model": model, "added_tokens": []}))
    table = crystal_table(codes, 30, 64, std=0.02)
    assert table.shape == (30, 64)
    assert np.sqrt(np.mean(table**2)) == pytest.approx(0.02)
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    near = unit @ unit.T
    assert min(near[26, 24], near[26, 25]) > 0.4
    alone = np.delete(near, 26, 0)
    others = np.delete(alone, 26, 1)[np.triu_indices(29, 1)]
    assert np.abs(others).mean() < 0.2, "different pieces are nearly orthogonal"


def test_a_crystal_row_is_the_sum_of_its_code() -> None:
    """In the directions of its primes, each as often as its exponent and as long as its logarithm."""
    model = {
        "type": "BPE",
        "vocab": {"a": 0, "b": 1, "aa": 2, "aab": 3},
        "merges": [["a", "a"], ["aa", "b"]],
    }
    codes = TokenCodes.build(MergeTree.from_tokenizer({"model": model, "added_tokens": []}))
    table = crystal_table(codes, 4, 8, std=0.02).astype(float)
    own = {  # the vector of a piece: what its token has beyond its parts
        0: table[0],
        1: table[1],
        2: table[2] - 2 * table[0],
        3: table[3] - table[2] - table[1],
    }
    lengths = np.array([np.linalg.norm(own[i]) for i in range(4)])
    logs = np.log(codes.primes[:4])
    np.testing.assert_allclose(lengths / lengths[0], logs / logs[0], rtol=1e-5)


def test_tokens_that_the_text_does_not_have_differ_from_each_other() -> None:
    rng = np.random.default_rng(3)
    following = np.zeros((40, 40))
    following[:30, :30] = rng.poisson(0.5, (30, 30))
    counts = following.sum(axis=1)
    table = corpus_table(sparse.csr_array(following), counts, 16, std=0.05, seed=1)
    unseen = table[30:]
    apart = np.linalg.norm(unseen[:, None] - unseen[None], axis=-1)[~np.eye(10, dtype=bool)]
    assert apart.min() > 0.05

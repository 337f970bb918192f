"""A token table that begins with what the corpus says: PPMI of a window, factored by a truncated SVD.

Words that occur in like contexts have like vectors from the first step on (Levy & Goldberg, "Neural
Word Embedding as Implicit Matrix Factorization", 2014; Levy, Goldberg & Dagan, "Improving Distributional
Similarity with Lessons Learned from Word Embeddings", 2015).
"""

from __future__ import annotations

from inspect import signature

import numpy as np
from scipy import sparse
from scipy.sparse import linalg

CONTEXT_EXPONENT = 0.75
"""Contexts are counted to this power, which takes weight from rare ones (Levy et al. 2015)."""
SINGULAR_EXPONENT = 0.5
"""Power of the singular values that the table keeps: 0.5 shares them between tokens and contexts."""
FREQUENCY_SCALE = 2.0
"""Root mean square of the column that holds the tokens' frequencies, as a multiple of the others'."""


def ppmi(
    counts: sparse.csr_array, *, exponent: float = CONTEXT_EXPONENT, shift: float = 0.0
) -> sparse.csr_array:
    """Positive pointwise mutual information of (V, V) counts, float64, in nats.

    max(log(p(i, j) / (p(i) p_e(j))) − shift, 0) with p_e(j) ∝ (Σ_i counts[i, j])^exponent; ``shift`` is
    log k of k negative samples. Pairs never seen have 0.
    """
    found = counts.tocoo()
    rows, columns = counts.sum(axis=1), counts.sum(axis=0) ** exponent
    share = columns / max(columns.sum(), 1e-300)
    values = np.log(found.data / (rows[found.row] * share[found.col])) - shift
    kept = values > 0
    places = (found.row[kept], found.col[kept])
    return sparse.coo_array((values[kept], places), shape=counts.shape).tocsr()


def truncated_svd(
    matrix: sparse.csr_array, rank: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The ``rank`` largest singular triplets, fewer if the matrix is smaller: U (m, r), S (r,) falling,
    V (n, r).

    Deterministic: ARPACK draws from ``seed`` where it begins and where it begins again, and the largest
    entry of each column of U is positive.
    """
    smaller = min(matrix.shape)
    if rank < smaller // 2:
        # In float32 it takes half the time, and the same space comes out.
        single = matrix.astype(np.float32)
        if matrix.shape[0] == smaller:
            left, values, right = _largest_triplets(single, rank, seed)
        else:
            right, values, left = _largest_triplets(single.T.tocsr(), rank, seed)
            left, right = left.T, right.T
    else:  # ARPACK finds at most all but one, and slowly where it is most of them
        left, values, right = np.linalg.svd(matrix.toarray(), full_matrices=False)
    order = np.argsort(-values, kind="stable")[:rank]
    left, values, right = left[:, order], values[order], right[order].T
    largest = np.abs(left).argmax(axis=0)
    signs = np.where(left[largest, np.arange(len(values))] < 0, -1.0, 1.0)
    return left * signs, values, right * signs


def _largest_triplets(
    wide: sparse.csr_array, rank: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """U, S and Vᵀ of a matrix with no more rows than columns, by its Gram matrix's eigenvectors.

    As ``scipy.sparse.linalg.svds`` does it, which has no place for a seed: a matrix of a lower rank than is
    asked for makes ARPACK begin again from a vector that it draws, each time another.
    """
    size = wide.shape[0]
    begin = np.random.default_rng(seed).standard_normal(size).astype(wide.dtype)
    turned = wide.T.tocsr()
    gram = linalg.LinearOperator(
        (size, size), matvec=lambda x: wide @ (turned @ x), dtype=wide.dtype
    )
    seeded = {"rng": seed} if "rng" in signature(linalg.eigsh).parameters else {}
    _, vectors = linalg.eigsh(gram, k=rank, v0=begin, tol=1e-6, **seeded)
    small, values, right = np.linalg.svd((turned @ vectors).T, full_matrices=False)
    return vectors @ small, values, right


def corpus_table(
    following: sparse.csr_array,
    counts: np.ndarray,
    width: int,
    *,
    std: float,
    seed: int,
    singular_exponent: float = SINGULAR_EXPONENT,
) -> np.ndarray:
    """A (V, ``width``) float32 table, whose entries have root mean square ``std``, of counts of pairs.

    ``following``: (V, V), as ``cllm.text.cooccurrence`` counts; ``counts``: (V,) occurrences of each token.
    What comes after a token and what comes before it are contexts of two kinds, the two halves of a
    (V, 2V) PPMI matrix: a model has to predict in one direction. Rows are U·S^``singular_exponent`` of its
    SVD, and in the last column the logarithm of the token's frequency, so that one direction of the hidden
    vector can say how frequent the next token is. Tokens never seen get a random row, and columns beyond
    the matrix's rank random values, both drawn from ``seed``.
    """
    size = following.shape[0]
    table = np.random.default_rng(seed).standard_normal((size, width))
    before_and_after = sparse.hstack([ppmi(following), ppmi(following.T.tocsr())], format="csr")
    left, values, _ = truncated_svd(before_and_after, max(width - 1, 1), seed)
    within = values > 1e-5 * max(values[0], 1e-300)
    left, values = left[:, within], values[within]
    # By the counts: the solver leaves rows of zeros near zero, not at it, and all alike.
    seen = np.flatnonzero(np.asarray(before_and_after.sum(axis=1)).ravel() > 0)
    if len(seen):
        rows = left[seen] * values**singular_exponent
        table[np.ix_(seen, np.arange(len(values)))] = rows / np.sqrt(np.mean(rows**2))
    frequency = np.log(counts + 0.5)
    frequency -= frequency.mean()
    spread = frequency.std()
    if width > 1 and spread > 0:
        table[:, -1] = frequency * (FREQUENCY_SCALE / spread)
    return (table * (std / np.sqrt(np.mean(table**2)))).astype(np.float32)

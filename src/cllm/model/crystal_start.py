"""A token table placed by the tokens' codes, without a look at which token stands beside which.

Each piece of a token is a prime, the more frequent the smaller, and a direction: in each plane of two
coordinates a place on the golden spiral. Tokens that share pieces begin near each other. It is there to
be compared with; ``docs/model.md`` has what the comparison gave.
"""

from __future__ import annotations

import numpy as np
from scipy import sparse

from cllm.lattice import golden, nth_primes
from cllm.text.merge_tree import MergeTree
from cllm.text.tokenizer import Tokenizer


def merge_pieces(tokenizer: Tokenizer, vocab_size: int) -> sparse.csr_array:
    """Which tokens each token was merged from, itself among them: (``vocab_size``,) * 2 of 0 and 1.

    BPE's merge tree stands in for morphology, an approximation: the tree of a token is what was frequent
    when it was built.
    """
    found = (MergeTree.from_tokenizer(tokenizer).contents() > 0).astype(np.float64)
    rest = sparse.eye_array(
        vocab_size - found.shape[0]
    )  # rows beyond the tokenizer's are their own
    whole = sparse.csr_array(sparse.block_diag([found, rest], format="csr"))
    whole.sort_indices()
    return whole


def crystal_table(
    incidence: sparse.csr_array, token_counts: np.ndarray, width: int, *, std: float
) -> np.ndarray:
    """A (V, ``width``) float32 table whose entries have root mean square ``std``.

    ``incidence``: (V, P), how often each piece is in each token; ``token_counts``: (V,) occurrences in the
    corpus, which rank the pieces. Row v is Σ_p incidence[v, p] · log(prime of p) · direction of p. In
    plane i, a piece of rank n has the angle of point n·(i-th prime) of the golden spiral (Vogel 1979), so
    that the directions of any two pieces are nearly orthogonal.
    """
    pieces = incidence.shape[1]
    frequency = incidence.T @ token_counts
    rank = np.empty(pieces, dtype=np.int64)
    rank[np.argsort(-frequency, kind="stable")] = np.arange(1, pieces + 1)
    planes = -(-width // 2)
    x, y = golden(rank[:, None] * nth_primes(planes)[None, :])
    directions = np.stack([x, y], axis=-1) / np.hypot(x, y)[..., None]
    weighted = np.log(nth_primes(pieces)[rank - 1])[:, None] * directions.reshape(pieces, -1)
    table = incidence @ weighted[:, :width]
    return (table * (std / np.sqrt(np.mean(table**2)))).astype(np.float32)

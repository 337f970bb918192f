"""Which pieces the tokens of a composed table are sums of, in a run."""

from __future__ import annotations

import numpy as np
from scipy import sparse

from cllm.core.config import Config
from cllm.core.errors import UsageError
from cllm.core.settings import merge
from cllm.text.merge_tree import MergeTree
from cllm.text.token_codes import TokenCodes
from cllm.text.tokenizer import Tokenizer


def incidence_of(tokenizer: Tokenizer, config: Config) -> sparse.csr_matrix:
    """The (V, P) zeros and ones of ``config.model.embedding``: a token's pieces are the tokens it was
    merged from, down to bytes, and itself (``own_vectors``); or the pieces of its code (``pieces_from``).

    Without own vectors, a token that nothing was merged into keeps its own, and pieces that are in no
    token have no column. Raises ``UsageError`` for a tokenizer without merges.
    """
    assert config.model.vocab_size is not None
    asked, size = config.model.embedding, config.model.vocab_size
    try:
        if asked.pieces_from == "codes":
            return code_pieces(tokenizer, size, own=asked.own_vectors)
        whole = sparse.csr_matrix(merge_pieces(tokenizer, size))
    except ValueError as error:
        raise UsageError(f"model.embedding.kind = {asked.kind!r}: {error}") from error
    if asked.own_vectors:
        return whole
    merged = np.diff(whole.indptr) > 1
    own = sparse.diags(merged.astype(float))
    parts = sparse.csr_matrix(whole - own)
    parts.eliminate_zeros()
    used = np.flatnonzero(np.asarray(parts.sum(axis=0)).ravel() > 0)
    return sparse.csr_matrix(parts[:, used])


def merge_pieces(tokenizer: Tokenizer, vocab_size: int) -> sparse.csr_array:
    """Which tokens each token was merged from, itself among them: (``vocab_size``,) * 2 of 0 and 1.

    BPE's merge tree stands in for morphology, an approximation: the tree of a token is what was frequent
    when it was built.
    """
    found = (MergeTree.from_tokenizer(tokenizer).contents() > 0).astype(np.float64)
    # Rows beyond the tokenizer's are their own.
    rest = sparse.eye_array(vocab_size - found.shape[0])
    whole = sparse.csr_array(sparse.block_diag([found, rest], format="csr"))
    whole.sort_indices()
    return whole


def code_pieces(tokenizer: Tokenizer, vocab_size: int, *, own: bool) -> sparse.csr_matrix:
    """The pieces of the tokens' codes (variants and stems among them): (``vocab_size``, P) zeros and ones.

    Which pieces a token has does not depend on a corpus, so that none is asked for. Rows beyond the
    tokenizer's have a piece of their own.
    """
    found = TokenCodes.build(MergeTree.from_tokenizer(tokenizer)).incidence(own=own)
    rest = sparse.eye_array(vocab_size - found.shape[0])
    whole = sparse.csr_matrix(sparse.block_diag([found, rest], format="csr"))
    whole.sort_indices()
    return whole


def resolve_pieces(config: Config, tokenizer: Tokenizer) -> Config:
    """``config`` with the numbers of pieces and of non-zeros that the tokenizer gives.

    Raises ``UsageError`` where others were asked for.
    """
    incidence = incidence_of(tokenizer, config)
    found = {"pieces": incidence.shape[1], "nonzeros": incidence.nnz}
    for name, value in found.items():
        asked = getattr(config.model.embedding, name)
        if asked not in (None, value):
            raise UsageError(
                f"model.embedding.{name} = {asked}, but this tokenizer gives {value}; leave it out"
            )
    return merge(config, {f"model.embedding.{name}": value for name, value in found.items()})

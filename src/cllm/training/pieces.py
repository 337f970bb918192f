"""Which pieces the tokens of a composed table are sums of, in a run."""

from __future__ import annotations

import numpy as np
from scipy import sparse

from cllm.core.config import Config
from cllm.core.errors import UsageError
from cllm.core.settings import merge
from cllm.model.crystal_start import merge_pieces
from cllm.text.tokenizer import Tokenizer


def incidence_of(tokenizer: Tokenizer, config: Config) -> sparse.csr_matrix:
    """The (V, P) zeros and ones of ``config.model.embedding``: a token's pieces are the tokens it was
    merged from, down to bytes, and itself (``own_vectors``).

    Without own vectors, a token that nothing was merged into keeps its own, and pieces that are in no
    token have no column.
    """
    assert config.model.vocab_size is not None
    whole = sparse.csr_matrix(merge_pieces(tokenizer, config.model.vocab_size))
    if config.model.embedding.own_vectors:
        return whole
    merged = np.diff(whole.indptr) > 1
    own = sparse.diags(merged.astype(float))
    parts = sparse.csr_matrix(whole - own)
    parts.eliminate_zeros()
    used = np.flatnonzero(np.asarray(parts.sum(axis=0)).ravel() > 0)
    return sparse.csr_matrix(parts[:, used])


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

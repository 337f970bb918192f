"""Which pieces a token has, and how frequent they are: what its code is made of."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np

from cllm.text.facts import literal
from cllm.text.merge_tree import MergeTree
from cllm.text.morphology import Morphology

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix


class Kind(IntEnum):
    """What a piece stands for."""

    TOKEN = 0
    VARIANTS = 1
    STEM = 2


Group = tuple[Kind, str, tuple[int, ...]]
"""A piece that is no token: its kind, its word and the tokens that have it."""


def label(name: str, text: bytes) -> str:
    """A token for display: a literal, or the name of one that has no bytes."""
    return literal(text) if text else name


def piece_groups(morphology: Morphology) -> list[Group]:
    """(kind, word, tokens) of the pieces that are no tokens."""
    variants = ((Kind.VARIANTS, key, ids) for key, ids in morphology.variants.items())
    stems = ((Kind.STEM, stem, ids) for stem, ids in morphology.relatives.items())
    return [*variants, *stems]


def piece_matrix(tree: MergeTree, words: Morphology, groups: list[Group]) -> csr_matrix:
    """(V, P) int64 sparse: how often each token (row) has each piece (column); the first V pieces are
    the tokens themselves, the others the groups.

    A row is the entrywise maximum of what its token has by itself and of what its models have.
    """
    from scipy.sparse import csr_matrix, hstack

    size = len(tree)
    ids = [np.array(tokens, dtype=np.int64) for _, _, tokens in groups]
    of_group = np.repeat(np.arange(len(groups)), [len(tokens) for tokens in ids])
    rows = np.concatenate([*ids, np.empty(0, dtype=np.int64)])
    ones = np.ones(len(rows), dtype=np.int64)
    members = csr_matrix((ones, (rows, of_group)), shape=(size, len(groups)))
    alone = csr_matrix(hstack([tree.contents(), members]))
    whole = alone
    for level in range(max(map(len, words.models), default=0)):
        pairs = [(t, models[level]) for t, models in enumerate(words.models) if len(models) > level]
        of, model = np.array(pairs, dtype=np.int64).T
        pick = csr_matrix((np.ones(len(of), dtype=np.int64), (of, model)), shape=(size, size))
        whole = whole.maximum(pick @ alone)
    whole = csr_matrix(whole)
    whole.sort_indices()
    return whole


def frequency_order(contents: csr_matrix, tree: MergeTree, counts: np.ndarray | None) -> np.ndarray:
    """Pieces (P,), the most frequent first: by the counts of the tokens that contain them, and among
    equals, or without counts, bytes first, then by the earliest merge."""
    size = len(tree)
    ranks = tree.ranks.copy()
    ranks[[i for i in range(size) if not tree.texts[i]]] = size  # special and unused ones come last
    groups = contents[
        :, size:
    ].tocsc()  # a piece that is no token: as early as the first that has it
    if groups.shape[1]:
        first = np.minimum.reduceat(ranks[groups.indices], groups.indptr[:-1])
        ranks = np.concatenate([ranks, first])
    number = np.arange(len(ranks))
    if counts is None:
        return np.lexsort((number, ranks))
    frequency = (contents > 0).T @ counts.astype(np.int64)
    return np.lexsort((number, ranks, -frequency))

"""Which tokens are drawn as candidates of sampled softmax, and how often each was to be expected.

A draw is a function of the seed and the number of the micro-batch, so that a resumed run draws the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cllm.text.batches import IGNORED
from cllm.text.hashing import derive, mix64
from cllm.training.neighbours import Neighbours


@dataclass(frozen=True, eq=False)
class Sampler:
    """Draws ``size`` candidates of V tokens with known expectations.

    Attributes:
        size: candidates of a draw, fewer than V.
        probabilities: (V,) of a draw; all above 0, or the estimate would not be of the whole softmax.
        seed: of the run.
        neighbours: of each token, the most similar by code; with them, the ``share`` of the draws goes to
            the neighbours of the batch's targets, in proportion to similarity.
    """

    size: int
    probabilities: np.ndarray
    seed: int
    neighbours: Neighbours | None = None
    share: float = 0.0

    def __post_init__(self) -> None:
        assert 0 < self.size < len(self.probabilities)
        assert (self.probabilities > 0).all()

    def draw(self, number: int, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Candidates (size,) int64 of micro-batch ``number``, and their expected counts (size,)."""
        weights = self.probabilities
        if self.neighbours is not None:
            counts = np.bincount(targets[targets != IGNORED], minlength=len(weights))
            near = self.neighbours.spread(counts)
            if near.sum() > 0:
                weights = (1 - self.share) * weights + self.share * near / near.sum()
        return stratified(weights, self.size, derive("candidates", self.seed, number))


def stratified(weights: np.ndarray, size: int, key: int) -> tuple[np.ndarray, np.ndarray]:
    """``size`` ids drawn with expectations in proportion to ``weights`` (V,), as far as none is expected
    more than once; ids (size,) int64 and their expected counts (size,).

    What would be expected more than once is taken once for certain. The others lie on a line, each as
    long as its expectation, which is cut into parts of length 1 with one draw in each (stratified
    sampling; Cochran 1977, chapter 5): the expected count of a token is its length, and draws do not
    clump. A token that lies across a cut can come twice.
    """
    expected, certain = expectations(weights, size)
    taken = np.flatnonzero(certain)
    left = size - len(taken)
    ends = np.cumsum(np.where(certain, 0.0, expected))
    random = (mix64(np.arange(left), key) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    # The line's end is `left` but for rounding; a draw behind it belongs to the last that has a length.
    last = int(np.flatnonzero(~certain)[-1])
    drawn = np.searchsorted(ends, np.arange(left) + random, side="right").clip(max=last)
    ids = np.concatenate([taken, drawn])
    return ids, expected[ids]


def expectations(weights: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Expected counts (V,) in proportion to ``weights`` but none above 1, summing to ``size`` (below V);
    and which are 1."""
    certain = np.zeros(len(weights), dtype=bool)
    while True:
        rest = weights[~certain].sum()
        expected = weights * ((size - certain.sum()) / rest)
        more = (expected >= 1.0) & ~certain
        if not more.any():
            return np.where(certain, 1.0, expected), certain
        certain |= more


def unigram(counts: np.ndarray) -> np.ndarray:
    """Frequencies (V,) of tokens with ``counts``, each seen once more than it was."""
    return (counts + 1.0) / (counts.sum() + len(counts))


def log_uniform(counts: np.ndarray) -> np.ndarray:
    """Zipf's law (V,) over the frequency ranks r = 1, 2, … of tokens: log(1 + 1/r) / log(V + 1)."""
    rank = np.empty(len(counts))
    rank[np.argsort(-counts, kind="stable")] = np.arange(1, len(counts) + 1)
    return np.asarray(np.log1p(1 / rank) / np.log(len(counts) + 1))

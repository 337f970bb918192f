"""Token codes: each token as a product of primes, one for each piece of its morphology.

The pieces of a token are the tokens it was merged from, down to bytes, and itself, each as often as it
occurs; where it has variants or relatives, a piece that stands for what they share; and the pieces of
the words that its word comes from: the code of ``run`` divides those of ``Run`` and ``' running'``,
however these were merged. (In the divisor lattice a code is the join of what it is made from.)

Pieces are given primes in the order of their frequency: by Zipf's law the logarithm of the r-th prime,
about log r + log log r, then grows like the information of the piece, −log of its frequency. A piece is
never longer than its token and of the same length only where a word has it from another, so that no two
tokens are pieces of each other: codes are unique.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from cllm.lattice.divisor import Codes
from cllm.lattice.primes import nth_primes
from cllm.lattice.similarity import similarity
from cllm.text.code_pieces import Kind, frequency_order, label, piece_groups, piece_matrix
from cllm.text.merge_tree import MergeTree
from cllm.text.morphology import Morphology

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

"""Tokens counted at a time."""
_ROWS = 64
"""Rows of similarities at a time."""


@dataclass(frozen=True, eq=False)
class TokenCodes:
    """The codes of V tokens over P pieces; piece i < V is token i.

    Attributes:
        codes: V codes; each factor is the prime of a piece.
        primes: (P,) int64, the prime of each piece.
        kinds: (P,) uint8, a ``Kind`` each.
        labels: the pieces for display: a token as a literal, of the others the word.
        counts: (V,) int64 of each token in the corpus; ``None`` if there was no corpus, and then the
            order of the merges stands in for frequency.
        tokenizer_sha256: ``MergeTree.sha256`` of the tokenizer that the codes are for.
    """

    codes: Codes
    primes: np.ndarray
    kinds: np.ndarray
    labels: tuple[str, ...]
    counts: np.ndarray | None
    tokenizer_sha256: str

    @classmethod
    def build(
        cls,
        tree: MergeTree,
        counts: np.ndarray | None = None,
        morphology: Morphology | None = None,
    ) -> TokenCodes:
        """Codes from a merge tree and the ``counts`` (V,) of its tokens in a corpus.

        Raises:
            ValueError: counts of another shape, negative, or no whole numbers.
        """
        size = len(tree)
        if counts is not None:
            counts = np.asarray(counts)
            whole = counts.dtype.kind in "iu" and counts.shape == (size,) and counts.min() >= 0
            if not whole:
                raise ValueError(
                    f"counts must be (V,) = ({size},) whole numbers and not negative, got "
                    f"{counts.dtype} of {counts.shape}; count the tokens of a corpus that this tokenizer "
                    "encoded"
                )
        words = Morphology.of(tree) if morphology is None else morphology
        groups = piece_groups(words)
        contents = piece_matrix(tree, words, groups)
        order = frequency_order(contents, tree, counts)
        primes = np.empty(len(order), dtype=np.int64)
        primes[order] = nth_primes(len(order))
        return cls(
            codes=_codes(contents, primes),
            primes=primes,
            kinds=np.array([Kind.TOKEN] * size + [kind for kind, _, _ in groups], dtype=np.uint8),
            labels=(*map(label, tree.names, tree.texts), *(word for _, word, _ in groups)),
            counts=None if counts is None else counts.astype(np.int64),
            tokenizer_sha256=tree.sha256,
        )

    def __len__(self) -> int:
        return len(self.codes)

    @cached_property
    def _piece_of(self) -> dict[int, int]:
        return {prime: piece for piece, prime in enumerate(self.primes.tolist())}

    @property
    def information(self) -> np.ndarray:
        """log₂ of each piece's prime (P,), in bits."""
        return np.log2(self.primes)

    def factors(self, token: int) -> list[tuple[int, int, int]]:
        """(piece, prime, exponent) of a token's code, the most informative first."""
        self._check([token])
        found = self.codes[token].items()
        return [(self._piece_of[prime], prime, e) for prime, e in sorted(found, reverse=True)]

    def describe(self, piece: int) -> str:
        """A piece in words: ``'un'``, ``variants of run``, ``stem run``."""
        before = {Kind.TOKEN: "", Kind.VARIANTS: "variants of ", Kind.STEM: "stem "}
        return before[Kind(int(self.kinds[piece]))] + self.labels[piece]

    def similarities(self, tokens: np.ndarray) -> np.ndarray:
        """log gcd / log lcm of ``tokens`` (n,) with all: (n, V) float64 in [0, 1]."""
        self._check(tokens)
        return similarity(self.codes.take(tokens), self.codes)

    def similar(self, tokens: np.ndarray | list[int], k: int = 10) -> tuple[np.ndarray, np.ndarray]:
        """The ``k`` other tokens nearest to each of ``tokens`` (n,), the nearest first, the smaller id
        among equals: ids and similarities (n, k); fewer columns where there are fewer others.

        Raises:
            ValueError: ``k`` below 1, or an id that there is not.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        self._check(tokens)
        asked = np.asarray(tokens, dtype=np.int64)
        k = min(k, len(self) - 1)
        ids = np.empty((len(asked), k), dtype=np.int64)
        scores = np.empty((len(asked), k))
        for start in range(0, len(asked), _ROWS):
            block = asked[start : start + _ROWS]
            rows = self.similarities(block)
            rows[np.arange(len(block)), block] = -1
            nearest = np.argsort(-rows, axis=1, kind="stable")[:, :k]
            ids[start : start + _ROWS] = nearest
            scores[start : start + _ROWS] = np.take_along_axis(rows, nearest, axis=1)
        return ids, scores

    def root(self, tokens: list[int]) -> int | None:
        """The most informative piece that all of ``tokens`` share; ``None`` if they share none.

        Of one token alone: its stem, failing that what its variants share, failing that its own piece.
        Raises ``ValueError`` for no tokens or an id that there is not.
        """
        self._check(tokens)
        if not tokens:
            raise ValueError("a root needs at least one token")
        shared = set.intersection(*(set(self.codes[token]) for token in tokens))
        pieces = [self._piece_of[prime] for prime in sorted(shared, reverse=True)]
        if len(set(tokens)) == 1:
            pieces.sort(
                key=lambda piece: -int(self.kinds[piece])
            )  # stable: the most informative stem
        return pieces[0] if pieces else None

    def exponents(self) -> csr_matrix:
        """How often each token has each piece: (V, P) float64 sparse, the exponents of the primes."""
        from scipy.sparse import csr_matrix

        data = self.codes.exponents.astype(np.float64)
        return csr_matrix(
            (data, (self.codes.rows(), self._columns)), shape=(len(self), len(self.primes))
        )

    def incidence(self, *, own: bool = True, max_pieces: int | None = None) -> csr_matrix:
        """Which pieces a token has: (V, P) float32 sparse, entries 1, however often a piece occurs.

        Args:
            own: with ``False`` a token's own piece is left out where others remain. Rows may then be
                equal (``'ab'`` and ``'ba'``).
            max_pieces: keep only so many pieces, the most frequent; a token of which none remains
                keeps its own beside them.

        With either, pieces that no token has any more get no column; the others stay in their order.

        Raises:
            ValueError: ``max_pieces`` below 1.
        """
        from scipy.sparse import csr_matrix

        rows, columns = self.codes.rows(), self._columns
        kept = np.ones(len(rows), dtype=bool)
        if max_pieces is not None:
            if max_pieces < 1:
                raise ValueError(f"max_pieces must be at least 1, got {max_pieces}")
            kept &= self.codes.primes <= self._sorted[min(max_pieces, len(self._sorted)) - 1]
        if not own:
            kept &= rows != columns
        bare = np.bincount(rows[kept], minlength=len(self)) == 0
        kept |= (rows == columns) & bare[rows]
        rows, columns = rows[kept], columns[kept]
        used, columns = np.unique(columns, return_inverse=True)
        data = np.ones(len(rows), dtype=np.float32)
        return csr_matrix((data, (rows, columns)), shape=(len(self), len(used)))

    @cached_property
    def _order(self) -> np.ndarray:
        """Pieces, the most frequent first."""
        return np.argsort(self.primes)

    @property
    def _columns(self) -> np.ndarray:
        """The piece of each of the codes' factors."""
        return self._order[np.searchsorted(self._sorted, self.codes.primes)]

    @cached_property
    def _sorted(self) -> np.ndarray:
        return self.primes[self._order]

    def _check(self, tokens: np.ndarray | list[int]) -> None:
        for token in np.asarray(tokens).tolist():
            if not isinstance(token, int):
                raise ValueError(f"a token's id is a whole number, not {token!r}")
            if not 0 <= token < len(self):
                raise ValueError(f"there is no token {token}: ids are 0 to {len(self) - 1}")


def _codes(contents: csr_matrix, primes: np.ndarray) -> Codes:
    factors = primes[contents.indices]
    lengths = np.diff(contents.indptr)
    order = np.lexsort((factors, np.repeat(np.arange(len(lengths)), lengths)))
    return Codes(
        contents.indptr.astype(np.int64), factors[order], contents.data[order].astype(np.int64)
    )

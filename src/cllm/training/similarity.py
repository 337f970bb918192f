"""A loss that pulls the vectors of tokens with similar codes together early in training, and fades.

For pairs (i, j) drawn among the nearest by code it is the mean of s_ij (1 − cos(e_i, e_j)), with s_ij the
divisor similarity log gcd / log lcm of the two codes and e the rows of the input table. A rare token
so takes part in what its relatives learn, before it was seen often enough to learn by itself.

There is no repulsion of other pairs. Codes do not know which tokens are unlike: two words without a
shared piece may well be synonyms. To keep apart what must be told apart is the cross-entropy's part, and
since this loss fades, nothing is left that could hold a table collapsed. The cosine leaves the rows'
lengths, in which tables hold frequency, as they are.

Which pairs are drawn is a function of the seed and the number of the micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor
from torch.nn import functional

from cllm.model.norms import wide
from cllm.text.hashing import derive, mix64
from cllm.training.neighbours import Neighbours


def pair_loss(rows_2mr: Tensor, basis_rd: Tensor | None, similarities_m: Tensor) -> Tensor:
    """The mean of s (1 − cos) over M pairs of a table's coordinates, with the basis that they are on."""
    vectors = rows_2mr if basis_rd is None else rows_2mr @ basis_rd
    first, second = wide(vectors).unbind()
    return (similarities_m * (1.0 - functional.cosine_similarity(first, second, dim=-1))).mean()


@dataclass(frozen=True, eq=False)
class PairSource:
    """Pairs of tokens for the similarity loss.

    Attributes:
        neighbours: that each token may be paired with.
        pairs: of a micro-batch.
        seed: of the run.
    """

    neighbours: Neighbours
    pairs: int
    seed: int

    @cached_property
    def _choices(self) -> np.ndarray:
        """How many neighbours each token has (V,)."""
        return (self.neighbours.similarities > 0).sum(axis=1)

    @cached_property
    def _paired(self) -> np.ndarray:
        """The tokens that have any."""
        return np.flatnonzero(self._choices)

    def draw(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Pairs (2, M) int64 and their similarities (M,) of micro-batch ``number``.

        The first of a pair is any token that has neighbours, each as likely as the others, the second
        any of its neighbours.
        """
        key = derive("pairs", self.seed, number)
        random = mix64(np.arange(2 * self.pairs), key).reshape(2, self.pairs)
        first = self._paired[(random[0] % np.uint64(len(self._paired))).astype(np.int64)]
        place = (random[1] % self._choices[first].astype(np.uint64)).astype(np.int64)
        second = self.neighbours.ids[first, place]
        return np.stack([first, second]), self.neighbours.similarities[first, place]

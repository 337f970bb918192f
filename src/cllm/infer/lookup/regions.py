"""What is known of each cell of an index: where it lies, how wide it is, how good its rows can be.

Everything here is in the table's principal coordinates (rotated, not moved), cut into blocks; bounds
add up block by block, which is tighter than one radius, since both queries and cells are longest in
the leading coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cllm.infer.lookup.metric import Rows

BLOCKS = 8
WHOLE, UNIT = 0, 1
"""Places of rows as they are and of rows scaled to length 1 (for cosines) in the cells' arrays."""


@dataclass(frozen=True)
class Regions:
    """Arrays of C cells; rows are sorted by cell.

    Attributes:
        rotation: float32 (D, D), orthogonal; columns are principal directions, the leading first.
        starts: int64 (C + 1,); cell c holds rows ``starts[c]:starts[c + 1]``.
        centres: float32 (2, C, D), means of the cells' rows x and of x/‖x‖, rotated.
        radii: float32 (2, C, blocks), largest length of a block of the differences from those.
        variances: float32 (2, C, blocks), mean square of one coordinate of that block.
        head: float32 (V, h), the leading rotated coordinates of each row.
        tail: float32 (V,), length of the other coordinates of x - centre.
        offset: float32 (V,), ‖x‖²/2 less the inner product of centre and x - centre in those
            coordinates.
    """

    rotation: np.ndarray
    starts: np.ndarray
    centres: np.ndarray
    radii: np.ndarray
    variances: np.ndarray
    head: np.ndarray
    tail: np.ndarray
    offset: np.ndarray

    @classmethod
    def of(cls, rows: Rows, starts: np.ndarray, rotation: np.ndarray) -> Regions:
        """Measure the cells ``starts`` of ``rows``."""
        V, D = rows.vectors.shape
        C, edges, h = len(starts) - 1, block_edges(D), head_size(D)
        centres = np.empty((2, C, D), dtype=np.float32)
        radii, variances = (np.empty((2, C, len(edges)), dtype=np.float32) for _ in range(2))
        head = np.empty((V, h), dtype=np.float32)
        tail, offset = np.empty(V, dtype=np.float32), rows.half.copy()
        for c in range(C):
            part = slice(starts[c], starts[c + 1])
            x = rows.vectors[part] @ rotation
            head[part] = x[:, :h]
            for kind, y in ((UNIT, x * rows.inverse[part, None]), (WHOLE, x)):
                centres[kind, c] = y.mean(axis=0, dtype=np.float64)
                rest = y - centres[kind, c]
                squares = np.square(rest)
                blocks = np.add.reduceat(squares, edges, axis=1)
                radii[kind, c] = np.sqrt(blocks.max(axis=0))
                variances[kind, c] = blocks.mean(axis=0) / block_sizes(D)
            tail[part] = np.sqrt(squares[:, h:].sum(axis=1))
            offset[part] -= rest[:, h:] @ centres[WHOLE, c, h:]
        return cls(rotation, starts, centres, radii, variances, head, tail, offset)

    @cached_property
    def sizes(self) -> np.ndarray:
        """Rows of each cell."""
        return np.diff(self.starts)

    def promise(self, q: np.ndarray, metric: str) -> np.ndarray:
        """The keys (n, C) that the best row of each cell is expected to have, for rotated queries
        (n, D): the mean key and √(2 ln rows) standard deviations, as of a maximum of normal
        variables; for ``l2`` by ``_least``."""
        if metric == "l2":
            own = np.square(q).sum(axis=1, keepdims=True)
            return np.asarray((own - self._least(q, own)) / 2)
        kind = UNIT if metric == "cosine" else WHOLE
        out = q @ self.centres[kind].T
        variance = block_squares(q) @ self.variances[kind].T
        variance *= self._many
        out += np.sqrt(np.maximum(variance, 0))
        return np.asarray(out)

    def _least(self, q: np.ndarray, own: np.ndarray) -> np.ndarray:
        """The squared distances (n, C) that the nearest row of each cell is expected to have; ``own``
        (n, 1): ‖q‖².

        A squared distance is no normal variable, least of all near the centre. It is taken for a χ²
        variable of the mean and the variance that it has (Patnaik 1949), whose cube root is nearly
        normal (Wilson & Hilferty 1931); of that cube root √(2 ln rows) deviations below the mean.
        """
        mean = own - 2 * (q @ self.centres[WHOLE].T - self._half)
        # What is less is rounding; the square of this is a float32 yet.
        mean = np.maximum(mean, 2.0**-20 * own + 1e-18)
        along = block_squares(q) @ self.variances[WHOLE].T
        along += self._own - q @ self._lean.T  # the variance of (q - centre)·x
        ninth = (4 * np.maximum(along, 0) + self._spread) / (9 * np.square(mean))
        roots = 1 - ninth - self._many_deviations * np.sqrt(ninth)
        return np.asarray(mean * np.maximum(roots, 0) ** 3)

    def bound(self, q: np.ndarray, metric: str) -> np.ndarray:
        """A key (C,) that no row of a cell exceeds, up to rounding, for one rotated query (D,)."""
        if metric == "l2":
            gaps = np.sqrt(block_squares(self.centres[WHOLE] - q)) - self.radii[WHOLE]
            least = np.square(np.maximum(gaps, 0)).sum(axis=1)
            return np.asarray((q @ q - least) / 2)
        kind = UNIT if metric == "cosine" else WHOLE
        lengths = np.sqrt(block_squares(q[None])[0])
        return np.asarray(self.centres[kind] @ q + self.radii[kind] @ lengths)

    def row_keys(
        self,
        q: np.ndarray,
        cells: np.ndarray,
        pieces: list[slice],
        rows: Rows,
        metric: str,
        share: float,
    ) -> np.ndarray:
        """Keys of the rows ``pieces`` of ``cells`` (ascending) as their leading coordinates show them,
        the others being those of the centre, and ``share`` of what the difference can add.

        With ``share`` 1 no key is larger than this, up to rounding (Cauchy and Schwarz).
        """
        h = self.head.shape[1]
        far, sizes = self.centres[WHOLE, cells, h:], self.sizes[cells]
        lean = q[h:] - far if metric == "l2" else q[None, h:]
        length = share * np.sqrt(np.square(lean).sum(axis=1))
        out, done, leading = np.empty(sizes.sum(), dtype=np.float32), 0, q[:h].copy()
        for piece in pieces:
            end = done + piece.stop - piece.start
            np.dot(self.head[piece], leading, out=out[done:end])
            done = end
        out += np.repeat(far @ q[h:], sizes)
        tails = np.concatenate([self.tail[piece] for piece in pieces])
        tails *= np.repeat(length, sizes) if metric == "l2" else length
        out += tails
        if metric == "l2":
            out -= np.concatenate([self.offset[piece] for piece in pieces])
        elif metric == "cosine":
            out *= np.concatenate([rows.inverse[piece] for piece in pieces])
        return np.asarray(out)

    @cached_property
    def _many(self) -> np.ndarray:
        return (2 * np.log(np.maximum(self.sizes, 2))).astype(np.float32)

    @cached_property
    def _many_deviations(self) -> np.ndarray:
        return np.sqrt(self._many)

    @cached_property
    def _spread(self) -> np.ndarray:
        """The variance of ‖x - centre‖² in each cell, of normal rows."""
        sizes = block_sizes(self.centres.shape[2])
        return np.asarray(2 * (np.square(self.variances[WHOLE]) @ sizes))

    @cached_property
    def _half(self) -> np.ndarray:
        """Mean of ‖x‖²/2 in each cell."""
        D = self.centres.shape[2]
        squares = np.square(self.centres[WHOLE]).sum(axis=1)
        return np.asarray((squares + self.variances[WHOLE] @ block_sizes(D)) / 2)

    @cached_property
    def _lean(self) -> np.ndarray:
        """Twice the centres, each coordinate times its variance."""
        widths = block_sizes(self.centres.shape[2]).astype(np.int64)
        return 2 * self.centres[WHOLE] * np.repeat(self.variances[WHOLE], widths, axis=1)

    @cached_property
    def _own(self) -> np.ndarray:
        return np.asarray((self._lean * self.centres[WHOLE]).sum(axis=1) / 2)


def block_edges(D: int) -> list[int]:
    """Where the blocks of D coordinates begin: at most eight, narrow ones first."""
    whole = BLOCKS * (BLOCKS + 1)
    return sorted({round(D * i * (i + 1) / whole) for i in range(BLOCKS)} - {D})


def block_sizes(D: int) -> np.ndarray:
    """Their widths, float32."""
    return np.diff([*block_edges(D), D]).astype(np.float32)


def block_squares(x: np.ndarray) -> np.ndarray:
    """Squared lengths (n, blocks) of the blocks of x (n, D)."""
    return np.asarray(np.add.reduceat(np.square(x), block_edges(x.shape[1]), axis=1))


def head_size(D: int) -> int:
    """Leading coordinates kept for bounds: a quarter, eight at least."""
    return min(max(D // 4, 8), D)

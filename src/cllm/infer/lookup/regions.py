"""What is known of each cell of an index: where it lies, how wide it is, how good its rows can be.

Everything here is in the table's principal coordinates (rotated, not moved), cut into blocks; bounds
add up block by block, which is tighter than one radius, since both queries and cells are longest in
the leading coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cllm.infer.lookup.metric import Rows

BLOCKS = 8


@dataclass(frozen=True)
class Regions:
    """Arrays of C cells; rows are sorted by cell.

    Attributes:
        rotation: float32 (D, D), orthogonal; columns are principal directions, the leading first.
        starts: int64 (C + 1,); cell c holds rows ``starts[c]:starts[c + 1]``.
        centres: float32 (C, D), means of the cells' rows, rotated.
        radii: float32 (C, blocks), largest length of a block of x - centre.
        variances: float32 (C, blocks), mean square of one coordinate of that block.
        inverse: float32 (C, 3), least, mean and largest 1/‖x‖ of a cell.
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
    inverse: np.ndarray
    head: np.ndarray
    tail: np.ndarray
    offset: np.ndarray

    @classmethod
    def of(cls, rows: Rows, starts: np.ndarray, rotation: np.ndarray) -> Regions:
        """Measure the cells ``starts`` of ``rows``."""
        V, D = rows.vectors.shape
        C, edges = len(starts) - 1, block_edges(D)
        h = head_size(D)
        centres = np.empty((C, D), dtype=np.float32)
        radii, variances = (np.empty((C, len(edges)), dtype=np.float32) for _ in range(2))
        inverse = np.empty((C, 3), dtype=np.float32)
        head = np.empty((V, h), dtype=np.float32)
        tail, offset = np.empty(V, dtype=np.float32), rows.half.copy()
        for c in range(C):
            part = slice(starts[c], starts[c + 1])
            x = rows.vectors[part] @ rotation
            centres[c] = x.mean(axis=0, dtype=np.float64)
            head[part] = x[:, :h]
            rest = x - centres[c]
            squares = np.square(rest)
            blocks = np.add.reduceat(squares, edges, axis=1)
            radii[c] = np.sqrt(blocks.max(axis=0))
            variances[c] = blocks.mean(axis=0) / np.diff([*edges, D])
            tail[part] = np.sqrt(squares[:, h:].sum(axis=1))
            offset[part] -= rest[:, h:] @ centres[c, h:]
            some = rows.inverse[part]
            inverse[c] = some.min(), some.mean(), some.max()
        return cls(rotation, starts, centres, radii, variances, inverse, head, tail, offset)

    @property
    def sizes(self) -> np.ndarray:
        """Rows of each cell."""
        return np.diff(self.starts)

    def promise(self, q: np.ndarray, metric: str) -> np.ndarray:
        """The keys (n, C) that the best row of each cell is expected to have, for rotated queries
        (n, D): the mean key and √(2 ln rows) standard deviations, as of a maximum of normal
        variables."""
        many = 2 * np.log(np.maximum(self.sizes, 2)).astype(np.float32)
        out = q @ self.centres.T
        if metric == "l2":
            # The spread is that of (q - c)·e, whose squared length by blocks is not a product.
            centre = np.square(self.centres).sum(axis=1)
            away = np.square(q).sum(axis=1)[:, None] - 2 * out + centre
            width = self.variances @ block_sizes(q.shape[1])
            out -= (centre + width) / 2
            out += np.sqrt(np.maximum(away, 0) * (width / q.shape[1] * many))
            return np.asarray(out)
        out += np.sqrt(block_squares(q) @ (self.variances * many[:, None]).T)
        return np.asarray(out * self.inverse[:, 1] if metric == "cosine" else out)

    def bound(self, q: np.ndarray, metric: str) -> np.ndarray:
        """A key (C,) that no row of a cell exceeds, up to rounding, for one rotated query (D,)."""
        if metric == "l2":
            gaps = np.sqrt(block_squares(self.centres - q)) - self.radii
            least = np.square(np.maximum(gaps, 0)).sum(axis=1)
            return np.asarray((q @ q - least) / 2)
        most = self.centres @ q + self.radii @ np.sqrt(block_squares(q[None])[0])
        if metric == "cosine":
            return np.asarray(most * np.where(most > 0, self.inverse[:, 2], self.inverse[:, 0]))
        return np.asarray(most)

    def row_bounds(
        self, q: np.ndarray, cells: np.ndarray, pieces: list[slice], rows: Rows, metric: str
    ) -> np.ndarray:
        """Keys that the rows ``pieces`` (of ``cells``, in order) do not exceed, up to rounding: the
        leading coordinates' part exactly, the others' by Cauchy and Schwarz about the centre."""
        h = self.head.shape[1]
        far, sizes = self.centres[cells, h:], self.sizes[cells]
        lean = q[h:] - far if metric == "l2" else q[h:][None]
        length = np.sqrt(np.square(lean).sum(axis=1))
        tails = np.concatenate([self.tail[piece] for piece in pieces])
        out = np.concatenate([self.head[piece] @ q[:h] for piece in pieces])
        out += np.repeat(far @ q[h:], sizes)
        out += tails * (np.repeat(length, sizes) if metric == "l2" else length)
        if metric == "l2":
            out -= np.concatenate([self.offset[piece] for piece in pieces])
        elif metric == "cosine":
            out *= np.concatenate([rows.inverse[piece] for piece in pieces])
        return out


def block_edges(D: int) -> list[int]:
    """Where the blocks of D coordinates begin: at most eight, narrow ones first."""
    widths = [D * (i + 1) / (BLOCKS * (BLOCKS + 1) / 2) for i in range(BLOCKS)]
    edges = {round(float(sum(widths[:i]))) for i in range(BLOCKS)}
    return sorted(edge for edge in edges if edge < D)


def block_sizes(D: int) -> np.ndarray:
    """Their widths, float32."""
    return np.diff([*block_edges(D), D]).astype(np.float32)


def block_squares(x: np.ndarray) -> np.ndarray:
    """Squared lengths (n, blocks) of the blocks of x (n, D)."""
    return np.asarray(np.add.reduceat(np.square(x), block_edges(x.shape[1]), axis=1))


def head_size(D: int) -> int:
    """Leading coordinates kept for bounds: a quarter, eight at least."""
    return min(max(D // 4, 8), D)

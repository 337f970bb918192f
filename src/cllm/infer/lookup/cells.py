"""Rows of a table in cells of a lattice, fine where rows are dense.

One scale for the whole table does not do: cells that are small enough for a dense cluster leave every
row of a sparse region alone. So a group of rows is cut by the lattice's cells of its own leading
principal coordinates (eight with E8, 24 with the Leech lattice), at the scale that makes the wanted number
of pieces, and pieces that are still too large are cut again, in their own coordinates. Rows of pieces that
are too small go to the nearest piece.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cllm.lattice.e8 import E8
from cllm.lattice.leech import Leech

LATTICES = ("e8", "leech")
_SAMPLE = 2048
_PIECES = 128


@dataclass(frozen=True)
class Cells:
    """Rows sorted by cell: cell c holds ``order[starts[c]:starts[c + 1]]``."""

    order: np.ndarray
    starts: np.ndarray


class Keys:
    """Numbers for the cells of a lattice, of the ``LATTICES``."""

    def __init__(self, lattice: str) -> None:
        self._lattice = E8() if lattice == "e8" else Leech()
        self.dimension = self._lattice.dimension
        # Beyond it float32 does not resolve the lattice; such points share the outer cells.
        self._reach = self._lattice.unit * 2.0 ** math.floor(
            math.log2(2**24 / (4 * self.dimension))
        )
        # Odd 64-bit numbers: a cell's coordinates become one key. A collision joins two cells, no more.
        random = np.random.default_rng(8)
        self._hash = random.integers(-(2**62), 2**62, self.dimension, dtype=np.int64) * 2 + 1

    def __call__(self, z: np.ndarray) -> np.ndarray:
        """A number (n,) int64 for the cell of each of z (n, dimension)."""
        cells = self._lattice.nearest(np.clip(z, -self._reach, self._reach))
        whole = np.rint(cells / self._lattice.unit).astype(np.int64)
        return np.asarray(whole @ self._hash)


def lattice_cells(points: np.ndarray, size: int, lattice: str = "e8") -> Cells:
    """Cells of about ``size`` rows of points (n, m) float32: most have size/4 to 2·size of them.

    Rows that are equal are never parted, so that many copies of one make a larger cell. Cells that were
    cut from one group follow each other. The same points give the same cells.

    Source of the cells: Conway & Sloane 1982 (the decoder of E8), Vardy & Be'ery 1993 (that of the Leech
    lattice); cells as hash keys of a search after Andoni & Indyk, "Near-optimal hashing algorithms", FOCS
    2006 (there the Leech lattice).
    """
    keys = Keys(lattice)
    done: list[np.ndarray] = []
    open_groups = [np.arange(len(points))]
    while open_groups:
        rows = open_groups.pop()
        pieces = _cut(points, rows, size, keys) if len(rows) > 2 * size else []
        if pieces:
            open_groups.extend(reversed(pieces))
        else:
            done.append(rows)
    starts = np.cumsum([0, *map(len, done)])
    return Cells(np.concatenate(done), starts)


def _cut(points: np.ndarray, rows: np.ndarray, size: int, keys: Keys) -> list[np.ndarray]:
    """Pieces of ``rows``, at least two of them; none if all rows are equal."""
    part = points[rows]
    z = _leading(part, keys.dimension)
    if not z.any():
        # The sample that chose the coordinates showed no difference; all rows tell.
        spread = np.ptp(part, axis=0)
        if not spread.any():
            return []
        z[:, 0] = part[:, spread.argmax()] - part[:, spread.argmax()].mean()
    wanted = min(max(len(rows) / size, 2), _PIECES)
    cells = keys(z / _scale(z[:: -(-len(z) // 512)], wanted, keys))
    labels = np.asarray(np.unique(cells, return_inverse=True)[1]).reshape(-1)
    labels = _merge_small(part, labels, min(size // 4, len(rows) // 4))
    if labels.max() == 0:
        labels = (z[:, 0] > _middle(z[:, 0])).astype(np.int64)
    order = np.argsort(labels, kind="stable")
    return np.split(rows[order], np.cumsum(np.bincount(labels))[:-1])


def _leading(part: np.ndarray, count: int) -> np.ndarray:
    """The rows' leading principal coordinates (n, count) about their mean; zeros where there are fewer."""
    sample = part[:: -(-len(part) // _SAMPLE)]
    mean = sample.mean(axis=0, dtype=np.float64).astype(np.float32)
    centred = sample - mean
    _, axes = np.linalg.eigh((centred.T @ centred).astype(np.float64))
    leading = axes[:, ::-1][:, :count].astype(np.float32)
    z = np.zeros((len(part), count), dtype=np.float32)
    z[:, : leading.shape[1]] = part @ leading - mean @ leading
    # What is left of rows that are equal is rounding.
    size = float(np.abs(part).max(initial=0.0)) * math.sqrt(part.shape[1])
    z[np.abs(z) <= 8 * np.finfo(np.float32).eps * size] = 0
    return z


def _scale(sample: np.ndarray, wanted: float, keys: Keys) -> float:
    """The scale at which the cells of ``sample`` are worth ``wanted`` of equal size.

    Two rounds of twelve scales, each decoded in one call: at this size calls cost more than points.
    """
    spread = float(np.sqrt(np.square(sample).sum() / len(sample)))
    low, high = spread / 32, 4 * spread
    for _ in range(2):
        scales = np.geomspace(low, high, 12)
        stacked = sample[None] / scales[:, None, None].astype(np.float32)
        cells = keys(stacked.reshape(-1, keys.dimension)).reshape(len(scales), -1)
        counts = [np.unique(row, return_counts=True)[1].astype(np.float64) for row in cells]
        worth = np.array([len(sample) ** 2 / np.square(c).sum() for c in counts])
        first = int(np.append(worth <= wanted, True).argmax())
        low, high = scales[max(first - 1, 0)], scales[min(first, len(scales) - 1)]
    return float(high)


def _merge_small(part: np.ndarray, labels: np.ndarray, least: int) -> np.ndarray:
    """Rows of pieces below ``least`` rows join the piece of the nearest mean; numbered anew."""
    counts = np.bincount(labels)
    kept = np.flatnonzero(counts >= max(least, min(counts.max(), 2)))
    number = np.full(len(counts), -1)
    number[kept] = np.arange(len(kept))
    labels = number[labels]
    loose = np.flatnonzero(labels < 0)
    if len(loose):
        means = segment_means(part, labels, len(kept))
        half = np.square(means).sum(axis=1) / 2
        for start in range(0, len(loose), 1 << 14):
            some = loose[start : start + (1 << 14)]
            labels[some] = (part[some] @ means.T - half).argmax(axis=1)
    return labels


def segment_means(part: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """Means (count, m) of the rows of each label; rows of a negative label count nowhere."""
    order = np.argsort(labels, kind="stable")
    order = order[np.searchsorted(labels[order], 0) :]
    sizes = np.bincount(labels[order], minlength=count)
    sums = np.add.reduceat(part[order], np.cumsum(sizes) - sizes, axis=0)
    return np.asarray(sums / sizes[:, None], dtype=part.dtype)


def _middle(values: np.ndarray) -> float:
    """A number below which there are about half of the values, and never all or none of them."""
    middle = float(np.median(values))
    return middle if (values > middle).any() else float(values[values < middle].max())

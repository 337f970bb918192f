"""Fixed-rate codebooks of E8 and Leech points: every block of a row is read without the others.

Voronoi codes (Conway & Sloane, "A fast encoding method for lattice codes and quantizers", IEEE Trans. Inf.
Theory 29, 1983): of a lattice Λ, the points around a shift a that are nearer to it than to any other point
of a + rΛ, r = 2^bits. There are r^width of them, so that a point's coordinates on Λ's basis modulo r
are its index, of exactly ``bits`` bits a weight. No table is stored, and none is searched.

The shift is half a shortest vector (a codebook around 0 would lie askew), and a little more, so that no
point is as near to two.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
import torch
from torch import Tensor

from cllm.compress.decoders.block_plane import lattice_of
from cllm.compress.lattices.blocks import Kind, runs
from cllm.lattice import nth_primes
from cllm.store.packing import pack_rows, unpack_rows

BITS = (2, 3, 4, 8)
# Where a target lies outside, it is drawn in so far at a time, so many times at most.
_PULL, _PULLS = 0.94, 16
_ASIDE = 2.0**-10
_AT_ONCE = 2**15
"""Weights whose points are computed at a time."""


@dataclass(frozen=True, kw_only=True)
class FixedSpec:
    """A fixed-rate codebook.

    Attributes:
        lattice: ``e8`` or ``leech``.
        bits: 2, 3, 4 or 8 bits a weight.
        group: columns that share a scale, 0 for the whole row; rounded down to whole blocks, and what is
            left over at the end belongs to the last group.
    """

    lattice: str
    bits: int
    group: int = 0

    def __post_init__(self) -> None:
        if self.lattice not in ("e8", "leech"):
            raise ValueError(f"fixed-rate codebooks are of e8 or leech, not {self.lattice!r}")
        if self.bits not in BITS:
            raise ValueError(f"{self.lattice} has 2, 3, 4 or 8 bits a weight, not {self.bits}")
        if self.group < 0:
            raise ValueError(f"a group has columns, not {self.group}")

    def group_of(self, columns: int) -> np.ndarray:
        """(columns,) the group of each column."""
        width = 8 if self.lattice == "e8" else 24
        if not self.group:
            return np.zeros(columns, dtype=np.int64)
        size = max(self.group // width, 1) * width
        return np.minimum(np.arange(columns) // size, max(columns // size, 1) - 1)


@dataclass(frozen=True, eq=False)
class FixedMatrix:
    """Rows of blocks. ``codes`` (m, n) uint8: a block's index as coordinates below 2^bits; ``scales``
    (m, groups) fp16."""

    spec: FixedSpec
    codes: Tensor
    scales: Tensor

    def dense(self) -> Tensor:
        """(m, n) float32."""
        m, n = self.codes.shape
        out = torch.empty(m, n, dtype=torch.float32)
        # So many rows that the passes over their points stay in cache.
        some = max(_AT_ONCE // max(n, 1), 1)
        for rows, run in product(
            (slice(i, i + some) for i in range(0, m, some)), runs(self.spec.lattice, n)
        ):
            part = self.codes[rows, run.start : run.stop]
            points = points_of(run.kind, part.reshape(-1, run.kind.width), self.spec.bits)
            out[rows, run.start : run.stop] = points.view(len(part), -1)
        group = torch.from_numpy(self.spec.group_of(n))
        return out.mul_(self.scales.float()[:, group])

    def parts(self) -> dict[str, Tensor]:
        """Tensors for a file; each row begins at a byte."""
        return {"codes": pack_rows(self.codes, self.spec.bits), "scales": self.scales}


def from_parts(spec: FixedSpec, columns: int, codes: Tensor, scales: Tensor) -> FixedMatrix:
    """The matrix, or any of its rows, of ``FixedMatrix.parts``. Raises ``ValueError`` for other sizes."""
    if scales.shape != (len(codes), int(spec.group_of(columns).max()) + 1):
        raise ValueError(f"{tuple(scales.shape)} scales for {len(codes)} rows of {columns}")
    return FixedMatrix(spec, unpack_rows(codes, spec.bits, columns), scales)


def points_of(kind: Kind, codes: Tensor, bits: int) -> Tensor:
    """(count, width) float64 values of indices ``codes`` (count, width): points less the shift."""
    generator, _, shift = _frame(kind)
    return _inside(kind, codes.double() @ generator, bits) - shift


def index_of(kind: Kind, points: Tensor, bits: int) -> Tensor:
    """(count, width) uint8 indices of ``points`` that ``nearest_codes`` found."""
    _, inverse, shift = _frame(kind)
    coordinates = ((points + shift) @ inverse).round()
    return torch.remainder(coordinates, 1 << bits).to(torch.uint8)


def nearest_codes(kind: Kind, targets: Tensor, bits: int) -> Tensor:
    """(count, width) float64 values of the codebook near ``targets`` (count, width): the nearest of the
    lattice where it is inside, and else the nearest found of those on the way to the middle."""
    _, _, shift = _frame(kind)
    lattice = lattice_of(kind)
    targets = targets.double().contiguous()
    points = lattice.nearest(targets + shift)
    out = _inside(kind, points, bits)
    outside = ((out - points).abs() > 1e-6).any(dim=1).nonzero()[:, 0]
    values = out - shift
    if len(outside):
        far = targets[outside]
        shares = _PULL ** torch.arange(_PULLS + 1, dtype=torch.float64)[1:, None, None]
        drawn = (far * shares + shift).reshape(-1, kind.width)
        tried = _inside(kind, lattice.nearest(drawn), bits).view(_PULLS, *far.shape) - shift
        tried = torch.cat([values[outside][None], tried])
        best = (tried - far).square().sum(dim=2).argmin(dim=0)
        values[outside] = tried[best, torch.arange(len(far))]
    return values


def _inside(kind: Kind, points: Tensor, bits: int) -> Tensor:
    """The point of the codebook in each point's class modulo r."""
    _, _, shift = _frame(kind)
    r = float(1 << bits)
    inside: Tensor = points - r * lattice_of(kind).nearest((points - shift) / r)
    return inside


@cache
def _frame(kind: Kind) -> tuple[Tensor, Tensor, Tensor]:
    """The generator (rows), its inverse and the shift of a lattice, float64."""
    generator = torch.from_numpy(lattice_of(kind).generator()).double()
    shift = torch.zeros(kind.width, dtype=torch.float64)
    # Half of (½; 2 and 2 in E8's units; 4 and 4 in Leech's): a shortest vector of each.
    shift[: min(2, kind.width)] = {1: 0.5, 8: 0.5, 24: 2 * kind.unit}[kind.width]
    # Square roots of primes are independent over the rationals: no lattice vector is at right angles.
    roots = torch.tensor(nth_primes(kind.width), dtype=torch.float64).sqrt()
    aside = torch.remainder(roots, 1.0) - 0.5
    return generator, torch.linalg.inv(generator), shift + _ASIDE * aside

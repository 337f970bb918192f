"""Root lattices: what they share, and the two simplest, Zⁿ and D_n.

Constants are from Conway & Sloane, "Sphere Packings, Lattices and Groups" (3rd ed. 1999), tables 1.2
and 2.3; the tests measure them again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch

from cllm.lattice.ball import coefficients_in_ball
from cllm.lattice.check import (
    as_targets,
    back,
    empty,
    magnitude,
    measured_targets,
    positive_int,
)
from cllm.lattice.codebook import Codebook
from cllm.lattice.threads import for_each

# Points decoded together, so that a dozen passes over them stay in the second-level cache.
CHUNK = 4096


class RootLattice(ABC):
    """A lattice with a fast exact decoder.

    Attributes:
        name, dimension.
        unit: every point is ``unit`` times an integer vector.
        volume: determinant.
        minimal_norm: squared length of the shortest vectors.
        kissing_number: how many there are.
        second_moment: normalised second moment G of the Voronoi cell, dimensionless (1/12 for Z).
    """

    name: str
    dimension: int
    unit: float
    volume: float
    minimal_norm: float
    kissing_number: int
    second_moment: float

    def __init__(self) -> None:
        self._balls: dict[float, Codebook] = {}

    def __repr__(self) -> str:
        return f"<{self.name}>"

    @abstractmethod
    def integer_generator(self) -> np.ndarray:
        """Basis (n, n) int64 of the lattice in steps of ``unit``, rows are vectors."""

    @abstractmethod
    def _contains(self, integers: torch.Tensor) -> torch.Tensor:
        """Membership (m,) of integer vectors (m, n) in steps of ``unit``."""

    @abstractmethod
    def _decode_all(self, points: torch.Tensor, out: torch.Tensor) -> None:
        """Nearest points to rows (m, n), written to rows of ``out``."""

    def generator(self) -> np.ndarray:
        """Basis (n, n) float64, rows are vectors."""
        return self.integer_generator() * self.unit

    def nearest(self, x: Any) -> Any:
        """Nearest lattice point to every row of x (m, n), exactly up to rounding in x's dtype.

        Returns the kind of x (torch or NumPy), float32 or float64. Equidistant points are all as
        near: which one is returned is deterministic but not specified.

        Raises:
            ValueError: wrong shape, not finite, or coordinates beyond what the dtype resolves.
        """
        points, size = measured_targets(x, self.dimension, "x")
        if size / self.unit > self._reach(points.dtype):
            raise ValueError(
                f"x of shape {tuple(points.shape)} has coordinates too large for {points.dtype}"
            )
        out = empty(points.shape, points.dtype)
        self._decode_all(points, out)
        return back(out.reshape(x.shape) if hasattr(x, "shape") else out, x)

    def _reach(self, dtype: torch.dtype) -> float:
        """Integers of this size and their sums over all coordinates are exact."""
        return 2.0 ** (24 if dtype == torch.float32 else 53) / (4 * self.dimension)

    def contains(self, x: Any, tolerance: float = 1e-4) -> Any:
        """Whether every row of x (m, n) is a lattice point within ``tolerance`` units a coordinate.

        Returns booleans (m,) of x's kind.

        Raises:
            ValueError: wrong shape or not finite.
        """
        points = as_targets(x, self.dimension, "x") / self.unit
        if magnitude(points) > 2.0**53:
            raise ValueError(f"x of shape {tuple(points.shape)} has coordinates beyond 2^53 units")
        integers = points.round()
        close = ((points - integers).abs() <= tolerance).all(dim=1)
        return back(close & self._contains(integers.long()), x)

    def codebook(self, radius: float) -> Codebook:
        """All points within ``radius`` of the origin (``codebook(r).shell(s)`` for one shell); kept
        with the lattice object, so that asking again costs nothing."""
        key = float(radius)
        if key not in self._balls:
            integers = self.integer_generator()
            coefficients = coefficients_in_ball(integers, key / self.unit)
            self._balls[key] = Codebook(coefficients @ integers, self.unit)
        return self._balls[key]

    def index(self, point: Any, radius: float) -> np.ndarray:
        """Numbers (m,) of lattice points (m, n) in the ball's canonical order; see ``Codebook``."""
        return self.codebook(radius).index(point)

    def point(self, index: Any, radius: float) -> np.ndarray:
        """Points (..., n) of the ball by number; the inverse of ``index``."""
        return self.codebook(radius).point(index)


def flip_worst(
    points: torch.Tensor, error: torch.Tensor, badness: torch.Tensor, odd: torch.Tensor
) -> torch.Tensor:
    """Step to the other side in the one coordinate of largest ``badness`` ≥ 0, where ``odd``.

    points, error, badness (n, m), odd (m,) of 0 and 1; in place. Ties must flip one coordinate only:
    the row's number takes the lowest bits of badness, which decides between nearly equal ones.
    """
    n = len(points)
    mask = (1 << (n - 1).bit_length()) - 1
    integer = torch.int32 if points.dtype == torch.float32 else torch.int64
    keys = badness.view(integer).bitwise_and(~mask)
    keys.bitwise_or_(torch.arange(n, dtype=integer)[:, None])
    worst = (keys == keys.amax(dim=0)).to(points.dtype)
    return points.add_(worst.mul_(odd).copysign_(error))


def parity(total: torch.Tensor) -> torch.Tensor:
    """0 or 1 for whole numbers held in floats."""
    half = total * 0.5
    return (half - half.floor()).mul_(2)


class InColumns(RootLattice):
    """A lattice whose points are decoded as columns, ``CHUNK`` of them at a time."""

    @abstractmethod
    def _decode(self, x: torch.Tensor) -> torch.Tensor:
        """Nearest points (n, m) to columns (n, m); may overwrite ``x``."""

    def _decode_all(self, points: torch.Tensor, out: torch.Tensor) -> None:
        """Nearest points to rows (m, n), written to rows of ``out``."""

        def decode(start: int) -> None:
            # NumPy's transposition is several times as fast as torch's.
            columns = torch.from_numpy(np.array(points[start : start + CHUNK].numpy().T, order="C"))
            part = out[start : start + CHUNK].numpy()
            np.copyto(part, self._decode(columns).numpy().T)

        for_each(decode, range(0, len(points), CHUNK))


class Zn(InColumns):
    """The integer lattice."""

    unit = 1.0
    volume = 1.0
    minimal_norm = 1.0
    second_moment = 1 / 12

    def __init__(self, n: int) -> None:
        super().__init__()
        self.dimension = positive_int(n, "n")
        self.name = f"Z{n}"
        self.kissing_number = 2 * n

    def integer_generator(self) -> np.ndarray:
        return np.eye(self.dimension, dtype=np.int64)

    def _contains(self, integers: torch.Tensor) -> torch.Tensor:
        return torch.ones(len(integers), dtype=torch.bool)

    def _decode(self, x: torch.Tensor) -> torch.Tensor:
        return x.round_()


class Dn(InColumns):
    """Integer vectors of even sum, n ≥ 3 (Conway & Sloane, "Fast quantizing and decoding algorithms
    for lattice quantizers and codes", IEEE Trans. Inf. Theory 28, 1982, algorithm 2)."""

    unit = 1.0
    volume = 2.0
    minimal_norm = 2.0

    def __init__(self, n: int) -> None:
        super().__init__()
        if positive_int(n, "n") < 3:
            raise ValueError(f"D_n needs n of at least 3, got {n}")
        self.dimension = n
        self.name = f"D{n}"
        self.kissing_number = 2 * n * (n - 1)
        # Conway & Sloane 1999, chapter 21, equation (for D_n): exact for every n.
        self.second_moment = (1 / 12 + 1 / (2 * n * (n + 1))) / 2 ** (2 / n)

    def integer_generator(self) -> np.ndarray:
        n = self.dimension
        basis = np.eye(n, k=-1, dtype=np.int64) - np.eye(n, dtype=np.int64)
        basis[0, :2] = (1, 1)
        return basis

    def _contains(self, integers: torch.Tensor) -> torch.Tensor:
        return integers.sum(dim=1) % 2 == 0

    def _decode(self, x: torch.Tensor) -> torch.Tensor:
        points = x.round()
        error = x.sub_(points)
        return flip_worst(points, error, error.abs(), parity(points.sum(dim=0)))

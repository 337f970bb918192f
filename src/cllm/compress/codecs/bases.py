"""The lattice that rows are rounded to: a rotation that is stored, or the original coordinates."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from cllm.compress.codecs.entropy import LARGEST, costs_like
from cllm.compress.codecs.points import PASSES, decide_blocks
from cllm.compress.codecs.quantize import nearest_plane, triangular
from cllm.compress.codecs.rate import TooFineError

# The widest plain basis that is reduced; wider ones are decided on as they are.
REDUCED = 256
# Squared distance, in step², that a bit is worth where distortion falls fourfold with each: 2 ln 2 / 12,
# rounded up.
WORTH = 0.12

Decide = Callable[[np.ndarray, np.ndarray, float], np.ndarray]


@dataclass(frozen=True)
class Basis:
    """Rows = factors · integers (k, D), or factors · identity where ``integers`` is ``None``.

    Coefficients on them are the integers of points of ``lattice`` (its units are in ``factors``).
    """

    factors: np.ndarray
    integers: np.ndarray | None
    decide: Decide
    """(rows under the metric, targets, price of a bit in squared distance) to coefficients (V, k)."""
    lattice: str = "z"

    @property
    def rows(self) -> np.ndarray:
        """(k, D) float64."""
        whole = np.eye(len(self.factors)) if self.integers is None else self.integers
        return self.factors[:, None] * whole

    def only(self, used: np.ndarray) -> Basis:
        """The basis of some of its rows."""
        assert self.integers is not None
        return replace(self, factors=self.factors[used], integers=self.integers[used])

    def of(self, lattice: str, beams: int) -> Basis:
        """The same directions for points of ``lattice``; those of E8 and Leech are found by K-best."""
        if lattice == "z":
            return self
        from cllm.compress.lattices.blocks import units  # which builds on this package

        decide = partial(decide_blocks, lattice=lattice, beams=beams)
        factors = self.factors * units(lattice, len(self.factors))
        return replace(self, factors=factors, decide=decide, lattice=lattice)


def rotated_basis(
    targets: np.ndarray, inverse: np.ndarray, step: float, precision: float, price: float
) -> Basis:
    """The eigenvectors of the targets (V, D), those that are worth their bits, largest first.

    ``inverse`` takes targets back to the table's coordinates. What is stored is the lattice's basis: its
    rows are rounded, each as finely as its column's integers are large, to errors of ``precision`` steps in
    the original coordinates. The table is then decided on the rounded basis, so that the rounding costs
    shape (its rows are not quite orthogonal) alone where the metric does not stretch these errors.
    """
    values, vectors = np.linalg.eigh(targets.T @ targets / len(targets))
    order = np.argsort(-values)
    spreads = np.asarray(np.sqrt(np.maximum(values[order], 0.0)))
    directions = vectors[:, order].T
    worth = _worth(targets @ directions.T / step, len(directions), max(price, WORTH))
    spreads, directions = spreads[worth], directions[worth] @ inverse
    unit = precision * np.sqrt(12) * step  # the standard deviation of rounding is 1/√12
    integers = np.rint(directions * (spreads[:, None] / unit))
    if integers.size and np.abs(integers).max() >= LARGEST:
        raise TooFineError("this table: integers of its rotation pass 30 bits")
    factors = (step * unit / spreads).astype(np.float32).astype(np.float64)
    full = integers.any(axis=1) & (factors > 0)
    return Basis(factors[full], integers[full].astype(np.int64), _decide_by_rate)


def _worth(coordinates: np.ndarray, width: int, price: float) -> np.ndarray:
    """Which columns lower the distortion by more than their bits and their basis row's are worth."""
    rounded = np.rint(coordinates)
    gains = (coordinates**2 - (coordinates - rounded) ** 2).sum(axis=0)
    used = rounded.any(axis=0)
    bits = np.array([_entropy(column) for column in rounded.T])
    worth: np.ndarray = used & (gains > price * (bits + 3 * width))
    return worth


def _entropy(column: np.ndarray) -> float:
    counts = np.unique(column, return_counts=True)[1]
    return float(counts @ np.log2(len(column) / counts))


def _decide_by_rate(rows: np.ndarray, targets: np.ndarray, price: float) -> np.ndarray:
    if not len(rows):
        return np.zeros((len(targets), 0))
    L, Q = triangular(rows)
    projected = targets @ Q.T
    chosen = nearest_plane(L, projected)
    for _ in range(PASSES if price and np.abs(chosen).max() < LARGEST else 0):
        costs = costs_like(chosen)
        chosen = nearest_plane(L, projected, classes=costs.classes, bits=costs.bits, price=price)
    return chosen


def plain_basis(width: int, step: float, beams: int) -> Basis:
    """The original coordinates at one step; the metric only decides which point is taken.

    Integers are decided by distance alone, on an LLL-reduced basis up to ``REDUCED`` columns. Raises
    ``TooFineError`` for a step that float32 does not hold.
    """
    if step < np.finfo(np.float32).tiny:
        raise TooFineError("float32")

    def decide(rows: np.ndarray, targets: np.ndarray, price: float) -> np.ndarray:
        return _decide_by_distance(rows, targets, beams)

    return Basis(np.full(width, float(np.float32(step))), None, decide)


def _decide_by_distance(rows: np.ndarray, targets: np.ndarray, beams: int) -> np.ndarray:
    """Coefficients on ``rows`` of near points, found by K-best on an LLL-reduced basis."""
    from cllm.lattice import closest, reduce

    # Where the metric is nearly blind they pass the targets by far.
    if np.abs(np.linalg.solve(rows.T, targets.T)).max() >= LARGEST / 4:
        raise TooFineError("this table: integers pass 30 bits")
    scale = np.abs(rows).max()
    basis, transform = rows / scale, np.eye(len(rows))
    if len(rows) <= REDUCED and _can_reduce():
        # Enough digits for the decision: distances are taken on the rows as they are.
        found = reduce(basis)
        transform = found.transform.astype(np.float64)
        basis = transform @ basis
    chosen = closest(basis, targets / scale, "k-best", K=beams).coefficients
    return np.asarray(chosen, dtype=np.float64) @ transform


def _can_reduce() -> bool:
    from importlib.util import find_spec

    if find_spec("fpylll") is not None:
        return True
    # Python shows a warning of one place and text once.
    warnings.warn(
        "fpylll is not installed: integers are searched on a basis that is not reduced, and may lie "
        "farther from the table (pip install fpylll)",
        RuntimeWarning,
        stacklevel=2,
    )
    return False

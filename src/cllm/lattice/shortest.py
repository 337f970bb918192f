"""The shortest vector problem: exact by enumeration, approximate by BKZ."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from cllm.lattice.check import as_basis, positive_int
from cllm.lattice.integers import narrow, to_float, to_fplll, to_integers
from cllm.lattice.measures import log_gaussian_heuristic, log_norms
from cllm.lattice.precision import segments
from cllm.lattice.reduction import Reduction, reduce

METHODS = ("exact", "bkz")

# Unpruned enumeration of a random lattice stays under a minute on one core up to here
# (`cllm bench lattice` times it); time grows exponentially with the dimension.
EXACT_LIMIT = 54

# Vectors of nearly the shortest length that are compared exactly, and how near is near (squared).
CANDIDATES = 64
SLACK = 1e-9
# Squared lengths below this are whole numbers that the enumeration's doubles keep apart.
DISTINCT = 2**40


@dataclass(frozen=True, kw_only=True)
class Shortest:
    """A short vector.

    Attributes:
        vector: (d,) in the basis's kind (float64, int64 or Python ints).
        coefficients: (n,) on the caller's basis, exact integers: ``coefficients @ B == vector``.
        norm: Euclidean length in the basis's unit.
        ratio: ``norm`` over the Gaussian heuristic of λ1.
        is_exact: True where enumeration proved that nothing is shorter. Over the integers that is
            literal, except that more than ``CANDIDATES`` vectors within a relative ``SLACK`` of each
            other and longer than doubles tell apart leave it False. A float basis is taken as
            rounded for its reduction: nothing is shorter by more than a relative 1e-9.
        finished: False where ``max_seconds`` ended the BKZ reduction before it was done.
    """

    vector: np.ndarray
    coefficients: np.ndarray
    norm: float
    ratio: float
    is_exact: bool
    finished: bool = True


def shortest(
    B: Any, method: str = "exact", block_size: int = 30, *, max_seconds: float | None = None
) -> Shortest:
    """A shortest non-zero vector of the lattice of B (n, d), rows are vectors.

    Args:
        B: basis, floats or integers of any scale.
        method: ``exact`` enumerates without pruning (Schnorr & Euchner 1994) on a BKZ-reduced basis,
            up to n = ``EXACT_LIMIT``; ``bkz`` returns the first vector of a BKZ reduction, which is
            an approximation: look at ``ratio``, about 1 for a shortest vector of a random lattice.
        block_size: of the BKZ reduction.
        max_seconds: time limit of ``bkz``, as ``reduce`` has it. ``exact`` takes none: fplll's
            enumeration cannot be interrupted.

    Raises:
        ValueError: malformed or rank-deficient basis, or a dimension beyond ``exact``, or a norm
            beyond float64.
    """
    array = as_basis(B)
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    positive_int(block_size, "block_size")
    if max_seconds is not None and method == "exact":
        raise ValueError("max_seconds is for method='bkz': exact enumeration cannot be stopped")
    n = len(array)
    if method == "exact" and n > EXACT_LIMIT:
        raise ValueError(
            f"basis of shape {array.shape}: exact enumeration takes more than a minute beyond n ="
            f" {EXACT_LIMIT}; use method='bkz' with block_size up to 40 for an approximation"
        )
    if n == 1:
        return _result(array, array[0], np.array([1]), is_exact=True)
    block = max(2, min(block_size, n))
    reduction = reduce(array, method="bkz", block_size=block, max_seconds=max_seconds)
    row, proved = np.zeros(n, dtype=np.int64), False
    first = _shortest_row(reduction)
    row[first] = 1
    if method == "exact":
        row, proved = _enumerate(reduction, first)
    vector = (row.astype(object) @ reduction.basis.astype(object)).astype(array.dtype)
    coefficients = row.astype(object) @ reduction.transform.astype(object)
    return _result(reduction.basis, vector, coefficients, proved, reduction.finished)


def _result(
    basis: np.ndarray,
    vector: np.ndarray,
    coefficients: np.ndarray,
    is_exact: bool,
    finished: bool = True,
) -> Shortest:
    floats, shift = _float_units(vector[None, :])
    length = float(np.linalg.norm(floats))
    try:
        norm = math.ldexp(length, shift)
    except OverflowError as error:
        raise ValueError(
            f"the shortest vector of a basis of shape {basis.shape} is longer than float64 holds:"
            " divide the basis by a common factor"
        ) from error
    heuristic = log_gaussian_heuristic(float(_log_norms(basis).sum()), len(basis))
    return Shortest(
        vector=vector,
        coefficients=narrow(coefficients),
        norm=norm,
        ratio=math.exp(math.log(length) + shift * math.log(2) - heuristic),
        is_exact=is_exact,
        finished=finished,
    )


def _float_units(rows: np.ndarray) -> tuple[np.ndarray, int]:
    """Rows as float64 near 1, and the binary exponent that was taken out."""
    if rows.dtype.kind == "f":
        shift = int(np.frexp(np.abs(rows).max())[1])
        return np.ldexp(rows, -shift), shift
    shift = max(abs(int(x)).bit_length() for x in rows.flat)
    return to_float(rows, shift), shift


def _row_units(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every row as float64 near 1 in a unit of its own, and the logarithms of the units (n,)."""
    pairs = [_float_units(row[None, :]) for row in rows]
    return np.concatenate([x for x, _ in pairs]), np.array([s * math.log(2) for _, s in pairs])


def _log_norms(rows: np.ndarray) -> np.ndarray:
    """ln‖b*_i‖ of rows of any range."""
    floats, units = _row_units(rows)
    return log_norms(floats) + units


def _shortest_row(reduction: Reduction) -> int:
    floats, units = _row_units(reduction.basis)
    return int((np.log(np.linalg.norm(floats, axis=1)) + units).argmin())


def _enumerate(reduction: Reduction, first: int) -> tuple[np.ndarray, bool]:
    """Coefficients on the reduced basis of a shortest vector, and whether that is proved.

    Row ``first`` gives the radius. fplll's distances are doubles, so everything within a relative
    ``SLACK`` of it is listed and compared over the integers.
    """
    from fpylll import GSO, Enumeration, EnumerationError

    basis = reduction.basis
    start = np.zeros(len(basis), dtype=np.int64)
    start[first] = 1
    # A vector no longer than the first row has no coefficient beyond the first segment.
    head = segments(_log_norms(basis))[0][1]
    rows = basis[:head]
    floats, _ = _float_units(rows)
    scaled = to_integers(floats)
    gso = GSO.Mat(to_fplll(scaled.rows), float_type="d")
    gso.update_gso()
    bound = math.ldexp(float(np.sum(floats[first] ** 2)), 2 * scaled.bits)
    try:
        listed = Enumeration(gso, nr_solutions=CANDIDATES).enumerate(
            0, head, bound * (1 + SLACK), 0
        )
    except EnumerationError:
        listed = []
    found = [np.rint(x).astype(np.int64) for _, x in listed]
    padded = [np.pad(x, (0, len(basis) - head)) for x in found]
    exact = [[int(x) for x in row] for row in rows] if rows.dtype.kind != "f" else scaled.rows
    lengths = [_squared(x[:head], exact) for x in (start, *padded)]
    best = lengths.index(min(lengths))
    # A full list may have cut off a vector that doubles cannot tell from those it kept.
    proved = len(found) < CANDIDATES or min(lengths) < DISTINCT
    return (start, *padded)[best], proved


def _squared(x: np.ndarray, rows: Any) -> int:
    vector = x.astype(object) @ np.array(rows, dtype=object)
    return int(sum(int(v) * int(v) for v in vector))

"""The shortest vector problem: exact by enumeration, approximate by BKZ."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from cllm.lattice.check import as_basis, positive_int
from cllm.lattice.integers import narrow, to_float, to_fplll, to_integers
from cllm.lattice.measures import gaussian_heuristic
from cllm.lattice.reduction import Reduction, reduce

METHODS = ("exact", "bkz")

# Unpruned enumeration of a random lattice stays under a minute on one core up to here
# (`cllm bench lattice` times it); every further dimension costs about half as much again.
EXACT_LIMIT = 54


@dataclass(frozen=True, kw_only=True)
class Shortest:
    """A short vector.

    Attributes:
        vector: (d,) in the basis's kind (float64, int64 or Python ints).
        coefficients: (n,) on the caller's basis, exact integers: ``coefficients @ B == vector``.
        norm: Euclidean length in the basis's unit.
        ratio: ``norm`` over the Gaussian heuristic of λ1.
        is_exact: True where enumeration proved that nothing is shorter.
    """

    vector: np.ndarray
    coefficients: np.ndarray
    norm: float
    ratio: float
    is_exact: bool


def shortest(B: Any, method: str = "exact", block_size: int = 30) -> Shortest:
    """A shortest non-zero vector of the lattice of B (n, d), rows are vectors.

    Args:
        B: basis, floats or integers of any scale.
        method: ``exact`` enumerates without pruning (Schnorr & Euchner 1994) on a BKZ-reduced basis,
            up to n = ``EXACT_LIMIT``; ``bkz`` returns the first vector of a BKZ reduction, which is
            an approximation: look at ``ratio``, about 1 for a shortest vector of a random lattice.
        block_size: of the BKZ reduction.

    Raises:
        ValueError: malformed or rank-deficient basis, or a dimension beyond ``exact``.
    """
    array = as_basis(B)
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    positive_int(block_size, "block_size")
    n = len(array)
    if method == "exact" and n > EXACT_LIMIT:
        raise ValueError(
            f"basis of shape {array.shape}: exact enumeration takes more than a minute beyond n ="
            f" {EXACT_LIMIT}; use method='bkz' with block_size up to 40 for an approximation"
        )
    if n == 1:
        return _result(array, array[0], np.array([1]), is_exact=True)
    reduction = reduce(array, method="bkz", block_size=max(2, min(block_size, n)))
    row = np.zeros(n, dtype=np.int64)
    row[_shortest_row(reduction)] = 1
    if method == "exact":
        row = _enumerate(reduction, row)
    vector = (row.astype(object) @ reduction.basis.astype(object)).astype(array.dtype)
    coefficients = row.astype(object) @ reduction.transform.astype(object)
    return _result(reduction.basis, vector, coefficients, is_exact=method == "exact")


def _result(
    basis: np.ndarray, vector: np.ndarray, coefficients: np.ndarray, is_exact: bool
) -> Shortest:
    floats, shift = _float_units(vector[None, :])
    norm = math.ldexp(float(np.linalg.norm(floats)), shift)
    floats, shift = _float_units(basis)
    heuristic = math.ldexp(gaussian_heuristic(floats), shift)
    return Shortest(
        vector=vector,
        coefficients=narrow(coefficients),
        norm=norm,
        ratio=norm / heuristic,
        is_exact=is_exact,
    )


def _float_units(rows: np.ndarray) -> tuple[np.ndarray, int]:
    """Rows as float64 near 1, and the binary exponent that was taken out."""
    if rows.dtype.kind == "f":
        shift = int(np.frexp(np.abs(rows).max())[1])
        return np.ldexp(rows, -shift), shift
    shift = max(abs(int(x)).bit_length() for x in rows.flat)
    return to_float(rows, shift), shift


def _shortest_row(reduction: Reduction) -> int:
    return int(np.linalg.norm(_float_units(reduction.basis)[0], axis=1).argmin())


def _enumerate(reduction: Reduction, row: np.ndarray) -> np.ndarray:
    """Coefficients on the reduced basis of a vector strictly shorter than ``row``'s, if one exists."""
    from fpylll import GSO, Enumeration, EnumerationError

    floats, _ = _float_units(reduction.basis)
    scaled = to_integers(floats)
    gso = GSO.Mat(to_fplll(scaled.rows), float_type="d")
    gso.update_gso()
    bound = math.ldexp(float(np.sum((row @ floats) ** 2)), 2 * scaled.bits)
    try:
        # The relative slack keeps out the vector itself under double rounding.
        found = Enumeration(gso).enumerate(0, len(row), bound * (1 - 1e-9), 0)
    except EnumerationError:
        return row
    return np.array(found[0][1]).astype(np.int64)

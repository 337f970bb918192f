"""Exact facts about integer matrices by arithmetic modulo word-sized primes."""

from __future__ import annotations

import numpy as np

from cllm.lattice.integers import magnitude, to_fplll

# The two largest primes below 2^31: products of residues fit int64.
PRIMES = (2147483647, 2147483629)


def residues(rows: np.ndarray, prime: int) -> np.ndarray:
    """The matrix modulo ``prime``, in int64."""
    return np.asarray(rows % prime, dtype=np.int64)


def determinant_mod(matrix: np.ndarray, prime: int) -> int:
    """det(matrix) mod ``prime`` of a square integer matrix, by Gaussian elimination."""
    work = residues(matrix, prime)
    n, value = len(work), 1
    for i in range(n):
        pivots = np.flatnonzero(work[i:, i])
        if pivots.size == 0:
            return 0
        p = i + int(pivots[0])
        if p != i:
            work[[i, p]] = work[[p, i]]
            value = prime - value
        pivot = int(work[i, i])
        value = value * pivot % prime
        factor = work[i + 1 :, i] * pow(pivot, -1, prime) % prime
        work[i + 1 :, i:] = (work[i + 1 :, i:] - factor[:, None] * work[i, i:]) % prime
    return value


def is_unimodular(matrix: np.ndarray) -> bool:
    """Whether det ≡ 1 modulo both primes, or ≡ -1 modulo both.

    Certain when it says no. When it says yes, |det| = 1 or det ∓ 1 is a non-zero multiple of the
    product of the primes, about 2^62.
    """
    values = [determinant_mod(matrix, p) for p in PRIMES]
    return values == [1, 1] or values == [p - 1 for p in PRIMES]


def first_dependent_row(rows: np.ndarray) -> int | None:
    """Index of the first row in the span of the rows before it, or None at full row rank.

    Dependent modulo both primes counts as dependent; independent modulo one of them is proof.
    """
    found = [_first_dependent(residues(rows, p), p) for p in PRIMES]
    known = [row for row in found if row is not None]
    return None if len(known) < len(PRIMES) else max(known)


def _first_dependent(work: np.ndarray, prime: int) -> int | None:
    for i in range(len(work)):
        columns = np.flatnonzero(work[i])
        if columns.size == 0:
            return i
        c = int(columns[0])
        inverse = pow(int(work[i, c]), -1, prime)
        factor = work[i + 1 :, c] * inverse % prime
        work[i + 1 :] = (work[i + 1 :] - factor[:, None] * work[i]) % prime
    return None


def product_equals(U: np.ndarray, B: np.ndarray, R: np.ndarray) -> bool:
    """Whether U @ B == R over the integers, exactly.

    int64 arithmetic wraps, so an int64 product is right modulo 2^64; where both sides are below
    2^63 that is equality. Otherwise GMP multiplies.
    """
    n = U.shape[1]
    if U.dtype == B.dtype == R.dtype == np.int64 and n * magnitude(U) * magnitude(B) < 2**62:
        return bool(np.array_equal(U @ B, R))
    return bool(to_fplll(U) * to_fplll(B) == to_fplll(R))

"""Gram–Schmidt orthogonalisation B = μB*, by Householder QR."""

from __future__ import annotations

from typing import Any

import numpy as np

from cllm.lattice.check import as_real_basis

METHODS = ("householder", "modified", "classical")


def gram_schmidt(B: Any, method: str = "householder") -> tuple[np.ndarray, np.ndarray]:
    """Gram–Schmidt coefficients and squared norms of the rows of a basis.

    Args:
        B: (n, d) basis, rows are vectors, n ≤ d.
        method: ``householder`` (the default) loses no orthogonality: the error of Q is of the order
            of the rounding unit at any condition number κ. ``modified`` loses κ times the unit and
            ``classical`` κ² times (Björck, "Solving linear least squares problems by Gram–Schmidt
            orthogonalization", BIT 1967; Giraud et al., Numer. Math. 2005). Both are kept because
            the comparison is one of the package's tests.

    Returns:
        ``mu`` (n, n), unit lower triangular, and ``squared_norms`` (n,), the ‖b*_i‖² in the square
        of the basis's unit, so that ``mu @ diag(squared_norms) @ mu.T == B @ B.T``.

    Raises:
        ValueError: not a finite matrix, or the rows are dependent; names the first dependent row. Or
            a square is beyond float64's range (``profile`` and ``lq`` have logarithms and lengths).
    """
    L, Q = lq(B, method)
    diagonal = np.diagonal(L)
    with np.errstate(over="ignore", under="ignore"):
        squares = diagonal**2
    if not (np.isfinite(squares).all() and squares.all()):
        raise ValueError(
            f"squared norms of a basis of shape {Q.shape} leave float64's range:"
            " divide the basis by a common factor"
        )
    return L / diagonal, squares


def lq(B: Any, method: str = "householder") -> tuple[np.ndarray, np.ndarray]:
    """B = L Q with L (n, n) lower triangular, positive diagonal ‖b*_i‖, and Q (n, d) orthonormal rows.

    Raises:
        ValueError: not a finite matrix, dependent rows, or a row longer than float64 holds.
    """
    B = as_real_basis(B)
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    norms = np.abs(B).max(axis=1)
    if not norms.all():
        _refuse(B, int(np.flatnonzero(norms == 0)[0]))
    # Rows scaled by powers of two: exact, and it keeps squares of huge or tiny entries in range.
    shift = np.frexp(norms)[1]
    scaled = np.ldexp(B, -shift[:, None])
    n, d = B.shape
    head = scaled[: min(n, d)]
    L, Q = _householder(head) if method == "householder" else _sweep(head, method == "modified")
    tolerance = max(n, d) * np.finfo(np.float64).eps * np.linalg.norm(head, axis=1)
    small = np.flatnonzero(np.abs(np.diagonal(L)) <= tolerance)
    if small.size:
        _refuse(B, int(small[0]))
    if n > d:
        _refuse(B, d)
    with np.errstate(over="ignore"):
        L = np.ldexp(L, shift[:, None])
    if not np.isfinite(L).all():
        raise ValueError(f"basis of shape {B.shape} has a row longer than float64 holds")
    return L, Q


def _refuse(B: np.ndarray, row: int) -> None:
    raise ValueError(
        f"basis of shape {B.shape} is rank deficient: row {row} depends on the rows before it"
    )


def _householder(B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    Q, R = np.linalg.qr(B.T)
    sign = np.where(np.diagonal(R) < 0, -1.0, 1.0)
    return np.tril((R * sign[:, None]).T), (Q * sign).T


def _sweep(B: np.ndarray, modified: bool) -> tuple[np.ndarray, np.ndarray]:
    """The textbook recurrences; a zero row of Q stands for a vector that vanished entirely."""
    n = len(B)
    L, Q = np.zeros((n, n)), np.zeros_like(B)
    for i in range(n):
        rest = B[i].copy()
        if modified:
            for j in range(i):
                L[i, j] = rest @ Q[j]
                rest -= L[i, j] * Q[j]
        else:
            L[i, :i] = Q[:i] @ rest
            rest -= L[i, :i] @ Q[:i]
        L[i, i] = np.linalg.norm(rest)
        Q[i] = rest / L[i, i] if L[i, i] else 0.0
    return L, Q

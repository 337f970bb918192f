"""Figures of merit of a basis, all from its Gram–Schmidt norms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cllm.lattice.check import as_real_basis
from cllm.lattice.gso import lq

SCALE = "divide the basis by a common factor"
_SMALLEST, _LARGEST = -708.0, 709.0


def log_norms(B: Any) -> np.ndarray:
    """Natural logarithms of ‖b*_i‖, shape (n,). Raises ``ValueError`` as ``gram_schmidt`` does."""
    return np.log(np.diagonal(lq(B)[0]))


def profile(B: Any) -> np.ndarray:
    """log2‖b*_i‖, shape (n,): flat is good, steep is bad."""
    return log_norms(B) / math.log(2)


def determinant(B: Any, log: bool = False) -> float:
    """Volume of the lattice, ∏‖b*_i‖ = sqrt(det B Bᵀ), or its natural logarithm.

    Raises:
        ValueError: as for ``gram_schmidt``, or the plain value leaves float64's range, as it does in
            high dimension: ask for ``log=True`` there.
    """
    total = float(log_norms(B).sum())
    return total if log else _exp(total, B, "determinant", "ask for log=True")


def orthogonality_defect(B: Any, log: bool = False) -> float:
    """∏‖b_i‖ / det, at least 1, and 1 only for orthogonal rows (or its natural logarithm).

    Raises:
        ValueError: as for ``determinant``.
    """
    total = float(log_norms(B).sum())
    defect = max(0.0, float(np.log(_row_norms(B)).sum()) - total)
    return defect if log else _exp(defect, B, "orthogonality defect", "ask for log=True")


def root_hermite_factor(B: Any) -> float:
    """(‖b_1‖ / det^{1/n})^{1/n}: about 1.02 for LLL, 1.0128 for BKZ-20 on random lattices
    (Gama & Nguyen, "Predicting lattice reduction", Eurocrypt 2008)."""
    logs = log_norms(B)
    n = len(logs)
    return math.exp((float(logs[0]) - float(logs.mean())) / n)


def gaussian_heuristic(B: Any) -> float:
    """Expected length of a shortest vector: the radius of the ball whose volume is the determinant,
    (det·Γ(n/2+1))^{1/n}/√π, in the basis's unit."""
    logs = log_norms(B)
    radius = log_gaussian_heuristic(float(logs.sum()), len(logs))
    return _exp(radius, B, "Gaussian heuristic", SCALE)


def log_gaussian_heuristic(log_det: float, n: int) -> float:
    """``gaussian_heuristic``'s natural logarithm from that of the determinant."""
    return (log_det + math.lgamma(n / 2 + 1)) / n - 0.5 * math.log(math.pi)


def mean_ratio_db(B: Any) -> float:
    """Arithmetic over geometric mean of ‖b*_i‖², in decibels; 0 dB is the best there is.

    The figure of merit for rounding: Babai's nearest plane leaves a residual uniform in the
    Gram–Schmidt box, so for targets uniform modulo the lattice (and no bounds on the coefficients)
    its expected squared error is Σ‖b*_i‖²/12, and at a fixed determinant only this ratio moves it.
    """
    squares = 2 * log_norms(B)
    peak = squares.max()
    arithmetic = peak + math.log(float(np.exp(squares - peak).mean()))
    return max(0.0, 10 / math.log(10) * (arithmetic - float(squares.mean())))


def dual(B: Any) -> np.ndarray:
    """Dual basis D (n, d) in the row span of B: ``B @ D.T`` is the identity.

    Raises:
        ValueError: as for ``gram_schmidt``.
    """
    from scipy.linalg import solve_triangular

    L, Q = lq(B)
    D: np.ndarray = solve_triangular(L, Q, lower=True, trans="T")
    if not np.isfinite(D).all():
        raise ValueError(f"the dual of a basis of shape {Q.shape} leaves float64's range: {SCALE}")
    return D


def _row_norms(B: Any) -> np.ndarray:
    B = as_real_basis(B)
    peak = np.abs(B).max(axis=1)
    safe = np.where(peak > 0, peak, 1.0)
    return safe * np.linalg.norm(B / safe[:, None], axis=1)


def _exp(x: float, B: Any, name: str, advice: str) -> float:
    """exp(x), or ``ValueError`` where that is not a normal float64."""
    if not _SMALLEST < x < _LARGEST:
        shape = as_real_basis(B).shape
        raise ValueError(f"the {name} of a basis of shape {shape} leaves float64's range: {advice}")
    return math.exp(x)

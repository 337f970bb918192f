"""Nearest plane with the rate in each decision: integers for all rows of a table, one column at a time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Bits = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(classes (V,), magnitudes (V,)) to the bits that they cost (V,)."""
ROWS = 256
"""Rows that a thread takes at a time; they stay in the second-level cache."""


def triangular(basis: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """L (k, k) upper triangular with a positive diagonal and Q (k, D) orthonormal: ``basis`` = L Q.

    Upper, so that the first coefficient is decided first, as the entropy coder learns them.
    """
    q, r = np.linalg.qr(basis[::-1].T)
    signs = np.where(np.diag(r) < 0, -1.0, 1.0)
    lower, rows = (r * signs[:, None]).T, (q * signs).T
    return lower[::-1, ::-1], rows[::-1]


def nearest_plane(
    L: np.ndarray,
    targets: np.ndarray,
    *,
    classes: np.ndarray | None = None,
    bits: Bits | None = None,
    price: float = 0.0,
) -> np.ndarray:
    """Integer coefficients (V, k), float64, whose points x·L are close to ``targets`` (V, k).

    Babai's nearest plane (1986). With a ``price`` (squared distance a bit) each decision takes, of the
    two integers beside the real coefficient and zero, the one of least distance plus price times
    ``bits`` (entropy-constrained quantization: Chou, Lookabaugh & Gray 1989).
    """
    chosen = np.empty_like(targets)

    def decide(start: int) -> None:
        part = slice(start, start + ROWS)
        mine = None if classes is None else classes[part]
        _decide(L, targets[part].copy(), chosen[part], mine, bits, price)

    from cllm.lattice.threads import for_each

    for_each(decide, range(0, len(targets), ROWS))
    return chosen


def _decide(
    L: np.ndarray,
    left: np.ndarray,
    chosen: np.ndarray,
    classes: np.ndarray | None,
    bits: Bits | None,
    price: float,
) -> None:
    """Fill in ``chosen`` (rows, k) for targets ``left``, which are used up."""
    for i in range(len(L)):
        real = left[:, i] / L[i, i]
        if bits is None or classes is None or not price:
            chosen[:, i] = np.rint(real)
        else:
            chosen[:, i] = _cheapest(real, L[i, i] ** 2, classes[:, i], bits, price)
        left[:, i + 1 :] -= chosen[:, i : i + 1] * L[i, i + 1 :]


def _cheapest(
    real: np.ndarray, square: float, classes: np.ndarray, bits: Bits, price: float
) -> np.ndarray:
    size = np.abs(real)
    below = np.floor(size)
    candidates = np.stack([below, below + 1, np.zeros_like(below)])
    costs = [
        square * (size - c) ** 2 + price * bits(classes, c.astype(np.int64)) for c in candidates
    ]
    best = np.argmin(costs, axis=0)
    picked: np.ndarray = np.take_along_axis(candidates, best[None], axis=0)[0]
    return np.copysign(picked, real)


def least_squares_scales(points: np.ndarray, basis: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """One factor c (k,) for each column that brings Σ_j c_j·points_j·basis_j nearest to ``targets``.

    ``points`` (V, k), ``basis`` (k, D), ``targets`` (V, D). 1 where a column is all zero.
    """
    gram = (points.T @ points) * (basis @ basis.T)
    right = ((points.T @ targets) * basis).sum(axis=1)
    used = np.diag(gram) > 0
    scales = np.ones(len(basis))
    if used.any():
        part = np.linalg.lstsq(gram[np.ix_(used, used)], right[used], rcond=None)[0]
        # Decisions that weigh the rate shorten what they decide, and no sound factor is far from 1.
        scales[used] = np.clip(part, 0.5, 1.5)
    return scales

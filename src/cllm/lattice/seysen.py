"""Seysen's simultaneous reduction of a basis and its dual (Combinatorica 13, 1993)."""

from __future__ import annotations

import numpy as np

from cllm.lattice.integers import magnitude, narrow, to_float

# A gain below this share of the measure is rounding, and could be taken back for ever.
_LEAST_GAIN = 1e-9


def seysen(transform: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lower S = Σ‖b_i‖²‖b_i^∨‖² of LLL-reduced integer rows, greedily, to a local minimum.

    Each step adds λ·b_i to b_j (and takes λ·b_j^∨ from b_i^∨) for the pair that lowers S most, with
    λ = ⌊½(G^∨_ij/G^∨_jj - G_ij/G_ii)⌉ (Seysen 1993, lemma 1; the greedy order is LaMacchia's, 1991).

    Returns:
        ``(transform, rows)`` after the same integer steps.

    Raises:
        ValueError: the reduced rows are too ill-conditioned for double.
    """
    floats = to_float(rows, magnitude(rows).bit_length())
    # Double inverts a Gram matrix up to a condition number of about 1/eps, the basis's squared.
    if not np.linalg.cond(floats) < np.finfo(np.float64).eps ** -0.5:
        raise ValueError(
            f"basis of shape {rows.shape} has rows too different in length for seysen, which works"
            " on the Gram matrix in double: use method='lll'"
        )
    steps = _steps(floats)
    transform, rows = transform.astype(object), rows.astype(object)
    for i, j, factor in steps:
        transform[j] += factor * transform[i]
        rows[j] += factor * rows[i]
    return narrow(transform), narrow(rows)


def seysen_measure(B: np.ndarray) -> float:
    """S(B) = Σ‖b_i‖²‖b_i^∨‖², at least n, and n only for orthogonal rows."""
    gram = B @ B.T
    return float(np.diagonal(gram) @ np.diagonal(np.linalg.inv(gram)))


def _steps(B: np.ndarray) -> list[tuple[int, int, int]]:
    gram = B @ B.T
    dual = np.linalg.inv(gram)
    steps: list[tuple[int, int, int]] = []
    while True:
        g, d = np.diagonal(gram), np.diagonal(dual)
        slope = gram * d - g[:, None] * dual
        curve = np.outer(g, d)
        factor = np.rint(-slope / (2 * curve))
        gain = -2 * factor * (slope + factor * curve)
        np.fill_diagonal(gain, 0)
        i, j = divmod(int(gain.argmax()), len(g))
        if gain[i, j] <= _LEAST_GAIN * float(g @ d):
            return steps
        k = factor[i, j]
        steps.append((i, j, int(k)))
        gram[j] += k * gram[i]
        gram[:, j] += k * gram[:, i]
        dual[i] -= k * dual[j]
        dual[:, i] -= k * dual[:, j]

"""The proof of a reduction: what ``reduce`` claims is checked on its result before it returns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cllm.lattice.gso import lq
from cllm.lattice.integers import magnitude, to_float, to_fplll
from cllm.lattice.modular import is_unimodular, product_equals
from cllm.lattice.precision import log_squared_norms, mpfr_precision

# fplll works with η = 0.51 (its LLL_DEF_ETA); the slack is for the rounding of both sides' GSO.
ETA = 0.51
SLACK = 1e-3


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What was found: every field is measured on the result, none is taken from fplll's word."""

    product_exact: bool
    unimodular: bool
    max_mu: float
    lovasz: float

    def holds(self, delta: float, reduced: bool = True) -> bool:
        """Exact and unimodular and, if ``reduced`` is asked for, size-reduced (|μ| ≤ η + ε) and
        Lovász at δ - ε."""
        return self.faults(delta, reduced) == ""

    def faults(self, delta: float, reduced: bool = True) -> str:
        """One line that says which conditions fail; empty where all hold."""
        # Written so that NaN, which no comparison holds for, is a fault.
        found = []
        if not self.product_exact:
            found.append("transform @ B differs from the basis")
        if not self.unimodular:
            found.append("the transform is not unimodular")
        if reduced and not self.max_mu <= ETA + SLACK:
            found.append(f"max |mu| is {self.max_mu:.4f}")
        if reduced and not self.lovasz >= delta - SLACK:
            found.append(f"Lovász holds at {self.lovasz:.4f} only, not {delta}")
        return "; ".join(found)


def certify(
    rows: np.ndarray, transform: np.ndarray, reduced: np.ndarray, delta: float
) -> Certificate:
    """Measure ``transform @ rows == reduced``, unimodularity, size reduction and Lovász.

    The Gram–Schmidt data come from a float64 QR, and where that does not show the basis reduced to
    ``delta``, from MPFR with room for every bit: rows of very different lengths need it.
    """
    max_mu, lovasz = reducedness(reduced)
    if not (max_mu <= ETA + SLACK and lovasz >= delta - SLACK):
        max_mu, lovasz = precise_reducedness(reduced)
    return Certificate(
        product_exact=product_equals(transform, rows, reduced),
        unimodular=is_unimodular(transform),
        max_mu=max_mu,
        lovasz=lovasz,
    )


def reducedness(rows: np.ndarray) -> tuple[float, float]:
    """max |μ_ij| below the diagonal, and the largest δ ≤ 1 at which the Lovász condition holds.

    From a float64 Householder QR; a basis that is dependent in float64 gives (inf, 0).
    """
    try:
        L, _ = lq(to_float(rows, _bit_length(rows)))
    except ValueError:
        return np.inf, 0.0
    diagonal = np.diagonal(L)
    with np.errstate(over="ignore"):
        steps = (diagonal[1:] / diagonal[:-1]) ** 2
    return _summary(L / diagonal, steps)


def precise_reducedness(rows: np.ndarray) -> tuple[float, float]:
    """``reducedness`` from fplll's Gram–Schmidt recurrence on the exact Gram matrix, in MPFR with
    twice the entries' bits (an inner product's) and 64 + 2n to spare."""
    from fpylll import GSO

    n, bits = len(rows), _bit_length(rows)
    with mpfr_precision(2 * bits + 2 * n + 64):
        gso = GSO.Mat(to_fplll(rows), float_type="mpfr", flags=GSO.INT_GRAM)
        gso.update_gso()
        mu = np.eye(n)
        for i in range(n):
            mu[i, :i] = [gso.get_mu(i, j) for j in range(i)]
        steps = np.diff(log_squared_norms(gso))
    return _summary(mu, np.exp(np.minimum(steps, 700.0)))


def _summary(mu: np.ndarray, steps: np.ndarray) -> tuple[float, float]:
    """From μ and the ‖b*_{i+1}‖²/‖b*_i‖²."""
    if len(mu) == 1:
        return 0.0, 1.0
    ratio = steps + np.diagonal(mu, -1) ** 2
    return float(np.abs(np.tril(mu, -1)).max()), float(np.minimum(1.0, ratio.min()))


def _bit_length(rows: np.ndarray) -> int:
    return magnitude(rows).bit_length()

"""The proof of a reduction: what ``reduce`` claims is checked on its result before it returns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cllm.lattice.gso import lq
from cllm.lattice.integers import to_float
from cllm.lattice.modular import is_unimodular, product_equals

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
        found = []
        if not self.product_exact:
            found.append("transform @ B differs from the basis")
        if not self.unimodular:
            found.append("the transform is not unimodular")
        if reduced and self.max_mu > ETA + SLACK:
            found.append(f"max |mu| is {self.max_mu:.4f}")
        if reduced and self.lovasz < delta - SLACK:
            found.append(f"Lovász holds at {self.lovasz:.4f} only, not {delta}")
        return "; ".join(found)


def certify(rows: np.ndarray, transform: np.ndarray, reduced: np.ndarray) -> Certificate:
    """Measure ``transform @ rows == reduced``, unimodularity, size reduction and Lovász."""
    max_mu, lovasz = reducedness(reduced)
    return Certificate(
        product_exact=product_equals(transform, rows, reduced),
        unimodular=is_unimodular(transform),
        max_mu=max_mu,
        lovasz=lovasz,
    )


def reducedness(rows: np.ndarray) -> tuple[float, float]:
    """max |μ_ij| below the diagonal, and the largest δ ≤ 1 at which the Lovász condition holds.

    From a float64 Householder QR, which is accurate enough because a reduced basis is well
    conditioned; a basis that is not gives (inf, 0).
    """
    top = max(int(abs(int(x))).bit_length() for x in rows.flat)
    try:
        L, _ = lq(to_float(rows, top))
    except ValueError:
        return np.inf, 0.0
    diagonal = np.diagonal(L)
    mu = L / diagonal
    n = len(L)
    if n == 1:
        return 0.0, 1.0
    below = np.abs(np.diagonal(mu, -1))
    ratio = (diagonal[1:] / diagonal[:-1]) ** 2 + below**2
    return float(np.abs(np.tril(mu, -1)).max()), min(1.0, float(ratio.min()))

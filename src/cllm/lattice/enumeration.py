"""Exact closest vectors by Schnorr–Euchner enumeration, its Gram–Schmidt data prepared once."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cllm.lattice.gso import lq
from cllm.lattice.integers import to_fplll, to_integers
from cllm.lattice.reduction import reduce

# fplll visits some 10^7 nodes a second: beyond this many expected nodes a target takes minutes.
NODE_LIMIT = 1e9
# From here on a stronger basis saves more nodes than it costs.
BKZ_DIMENSION = 30


def expected_nodes(log_norms: np.ndarray, radius: float, widths: np.ndarray | None = None) -> float:
    """Nodes of a full enumeration within ``radius`` by the Gaussian heuristic,
    Σ_k V_k(radius)/∏_{i>n-k}‖b*_i‖ (Hanrot & Stehlé, Crypto 2007, section 4).

    ``widths`` (n,) are the numbers of values that a box leaves each coefficient: a level has at most
    its width times the nodes of the level before.
    """
    total, tail, log_nodes = 0.0, 0.0, 0.0
    for k, log_norm in enumerate(log_norms[::-1], start=1):
        tail += float(log_norm)
        log_ball = 0.5 * k * math.log(math.pi) - math.lgamma(k / 2 + 1)
        level = log_ball + k * math.log(radius) - tail
        if widths is not None:
            level = min(level, log_nodes + math.log(float(widths[-k])))
            # The start is in the box and in the ball, so no level is empty.
            log_nodes = max(0.0, level)
            level = log_nodes
        total += math.exp(min(700.0, level))
    return total


class Enumerator:
    """Closest vectors in the whole lattice of one basis, one target at a time inside fplll.

    The basis is reduced once (LLL, and BKZ-20 from n = 30), so its quality does not depend on the
    caller's.
    """

    def __init__(self, B: np.ndarray) -> None:
        from fpylll import GSO

        method = "bkz" if len(B) >= BKZ_DIMENSION else "lll"
        reduction = reduce(B, method=method)
        self.transform = reduction.transform
        self.basis = np.asarray(reduction.basis, dtype=np.float64)
        self.L, self.Q = lq(self.basis)
        # Norms near 1 for fplll, whatever the caller's unit.
        self.unit = math.frexp(float(self.L[0, 0]))[1]
        scaled = to_integers(np.ldexp(self.basis, -self.unit))
        self.bits = scaled.bits - self.unit
        self._gso: Any = GSO.Mat(to_fplll(scaled.rows), float_type="d")
        self._gso.update_gso()

    def closest(self, target: np.ndarray, start: np.ndarray) -> np.ndarray:
        """Coefficients (n,) on ``self.basis`` of a point closest to ``target`` (d,).

        ``start`` (n,) are coefficients of any lattice point; the search is inside its distance.

        Raises:
            ValueError: the expected number of nodes is beyond ``NODE_LIMIT``.
        """
        from fpylll import Enumeration, EnumerationError

        # Coordinates relative to the start are small, which keeps the centres exact in double.
        y = (target - start @ self.basis) @ self.Q.T
        squared = float(y @ y)
        if squared == 0.0:
            return start
        nodes = expected_nodes(np.log(np.diagonal(self.L)), math.sqrt(squared))
        if nodes > NODE_LIMIT:
            raise ValueError(
                f"exact enumeration in dimension {len(self.L)} would visit about {nodes:.1e} nodes"
                " for one target: use method='k-best' with a larger K"
            )
        radius = math.ldexp(squared, 2 * self.bits) * (1 + 1e-9)
        centre = (y / np.diagonal(self.L)).tolist()
        try:
            # An Enumeration keeps its best solution from call to call: each target needs its own.
            found = Enumeration(self._gso).enumerate(0, len(self.L), radius, 0, target=centre)
        except EnumerationError:
            return start
        step = np.array(found[0][1])
        better = y - step @ self.L
        return start + step if float(better @ better) < squared else start

"""Rows that are decided one block after the other, since an error in one can make up for another's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cllm.compress.factor import damp, decision_order, factor

SIZE = 64
"""Rows of a block: within it rows are decided side by side, as if they did not know of each other."""
DAMPING = 0.03

Decide = Callable[[Tensor, Tensor], Tensor]
"""(rows (b,) of the matrix, what they should be (b, n)) to what they become (b, n)."""


@dataclass(frozen=True, eq=False)
class RowFactor:
    """G = RᵀR (m, m) in the order of ``order``, R (m, m) upper triangular float64, for
    min tr(G E H Eᵀ), E = W − Ŵ."""

    R: Tensor
    order: Tensor

    def each(self, weight: Tensor, decide: Decide) -> None:
        """Have ``decide`` take the rows of ``weight`` (m, n), block after block from the last to the first.

        What a block should be is where the objective is least, given the errors of the blocks before and
        with those after it free: W_b + R_bb⁻¹ R_b,later E_later, the block form of nearest plane.
        """
        W, R = weight[self.order].double(), self.R
        errors = torch.zeros_like(W)
        m = len(W)
        for stop in range(m, 0, -SIZE):
            part = slice(max(0, stop - SIZE), stop)
            pull = R[part, stop:] @ errors[stop:]
            wanted = W[part] + torch.linalg.solve_triangular(R[part, part], pull, upper=True)
            made = decide(self.order[part], wanted.to(weight.dtype))
            errors[part] = W[part] - made

    def carried(self, errors: Tensor) -> Tensor:
        """What errors (m, n) of rows against their wanted values become against the weights: the
        solution E of U E = errors with R = diag · U."""
        U = self.R / torch.diagonal(self.R)[:, None]
        solved = torch.linalg.solve_triangular(U, errors[self.order].double(), upper=True)
        out = torch.empty_like(solved)
        out[self.order] = solved
        return out.to(errors.dtype)


def row_factor(outer: Tensor) -> RowFactor:
    """Of G (m, m), damped by ``DAMPING`` of its mean diagonal; the largest diagonal is decided first."""
    damped = damp(outer.double(), DAMPING)
    places = decision_order(damped, "act")
    R, _ = factor(damped, places)
    return RowFactor(R, places)

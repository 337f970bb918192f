"""Sums of xxᵀ, of which only one triangle is computed."""

from __future__ import annotations

from torch import Tensor

BLOCK = 128


def add_products(total: Tensor, rows: Tensor, weighted: Tensor | None = None) -> None:
    """Add Σ xxᵀ of ``rows`` (t, n) to the upper triangle of ``total`` (n, n), and to some of the rest,
    whose numbers mean nothing. ``weighted``: the rows times what each counts."""
    first = rows if weighted is None else weighted
    for start in range(0, total.shape[0], BLOCK):
        part = slice(start, start + BLOCK)
        total[part, start:].addmm_(first[:, part].T, rows[:, start:])


def mirrored(total: Tensor) -> Tensor:
    """The symmetric matrix of the upper triangle of ``total``."""
    upper = total.triu()
    return upper + upper.triu(1).T

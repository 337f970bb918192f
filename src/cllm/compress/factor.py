"""Factors of a metric: how it is damped, in which order columns are decided, and the triangle of it."""

from __future__ import annotations

import torch
from torch import Tensor

ORDERS = ("natural", "act", "min-pivot")
"""Orders of decision: the columns as they are, largest diagonal of H first (GPTQ's act-order), and the
least diagonal of the Schur complement last (Chen et al., "The Geometry of LLM Quantization", 2025)."""


def damp(H: Tensor, damping: float) -> Tensor:
    """``H`` with ``damping`` · mean diagonal on its diagonal, dead inputs apart (see ``problem``)."""
    diagonal = torch.diagonal(H)
    dead = diagonal == 0
    if bool(dead.all()):
        return torch.eye(len(H), dtype=H.dtype)
    mean = diagonal[~dead].mean()
    out = H.clone()
    out[dead, :] = 0
    out[:, dead] = 0
    out.diagonal().add_(damping * mean)
    out.diagonal()[dead] = mean * (1 + damping)
    return out


def decision_order(H: Tensor, order: str) -> Tensor:
    """(n,) columns so that the last is decided first."""
    n = len(H)
    if order == "natural":  # the first column is decided first, as in GPTQ
        return torch.arange(n - 1, -1, -1)
    if order == "act":
        return torch.argsort(torch.diagonal(H), stable=True)
    left, places = H.clone(), []
    open_columns = torch.ones(n, dtype=torch.bool)
    for _ in range(n):
        pivots = torch.where(open_columns, torch.diagonal(left), torch.inf)
        j = int(pivots.argmin())
        places.append(j)
        open_columns[j] = False
        pivot = left[j, j].clamp_min(1e-300)
        left = left - torch.outer(left[:, j], left[j]) / pivot
    return torch.tensor(places)


def factor(H: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Upper triangular R with RᵀR = H in the order of ``places``, and H as it was factored."""
    extra, mean = 0.0, float(torch.diagonal(H).mean())
    while True:
        whole = H.clone()
        whole.diagonal().add_(extra * mean)
        R, failed = torch.linalg.cholesky_ex(whole[places][:, places], upper=True)
        if not int(failed) and float(torch.diagonal(R).min()) > 0:
            return R, whole
        extra = max(extra * 10, 1e-12)

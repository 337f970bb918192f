"""Rounding a weight matrix as a closest-vector problem: the metric H, damped, ordered and factored."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from cllm.compress.factor import ORDERS, damp, decision_order, factor
from cllm.compress.rows import RowFactor, row_factor


@dataclass(frozen=True, eq=False)
class Problem:
    """min over points Ŵ of a grid of Σ_rows (w − ŵ) H (w − ŵ)ᵀ.

    Columns of ``weight`` (m, n) and ``U`` (n, n) are in the order of the factor, which is decided from
    the last column to the first: H = Uᵀ diag(``squares``) U with U upper triangular and a unit diagonal.
    ``order`` (n,): the original column of each.
    """

    weight: Tensor
    U: Tensor
    squares: Tensor
    order: Tensor
    H: Tensor
    """(n, n) float64, damped, in the original order."""
    rows: RowFactor | None = None
    """Where rows are not alone: the objective is then tr(G E H Eᵀ) of E = W − Ŵ."""
    whole: Problem | None = None
    """The problem whose metric this one has, for other rows."""

    @cached_property
    def ordered_metric(self) -> Tensor:
        """H (n, n) in the order of the columns of ``weight`` and in its precision."""
        if self.whole is not None:
            return self.whole.ordered_metric
        return self.H[self.order][:, self.order].to(self.weight.dtype).contiguous()

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return int(self.weight.shape[0]), int(self.weight.shape[1])

    def back(self, ordered: Tensor) -> Tensor:
        """Columns (…, n) in the factor's order to the original one."""
        out = torch.empty_like(ordered)
        out[..., self.order] = ordered
        return out

    def original(self) -> Tensor:
        """The weights (m, n) with their columns in the original order."""
        return self.back(self.weight)

    def objective(self, values: Tensor) -> Tensor:
        """(m,) float64: (w − ŵ) H (w − ŵ)ᵀ of ``values`` (m, n), columns in the original order."""
        return objective(self.original(), values, self.H)

    def with_weight(self, weight: Tensor) -> Problem:
        """The same metric for other rows (m', n), each alone, columns in the original order."""
        rows = weight[:, self.order].to(self.weight.dtype).contiguous()
        whole = self.whole or self
        return Problem(rows, self.U, self.squares, self.order, self.H, whole=whole)


def problem(
    weight: Any,
    H: Any,
    *,
    damping: float = 0.01,
    order: str = "act",
    dtype: torch.dtype = torch.float64,
    blocks: Any = None,
    outer: Tensor | None = None,
) -> Problem:
    """Prepare ``weight`` (m, n) under the metric ``H`` (n, n) for the decoders.

    ``damping``: share of the mean diagonal that is added to it. An input that never occurs (zero
    diagonal) costs nothing wherever its weights go: it gets the mean diagonal and no correlation, so that
    its weights are rounded to the nearest. A metric of zeros counts as the identity. Where the factor
    fails in float64 (rank deficiency without damping), damping grows tenfold until it does not.
    ``blocks`` (n,), a number for each column: columns of one number are decided together, blocks in the
    order of their mean place. ``outer`` (m, m): what errors of the outputs cost, G of ``rows``.

    Raises ``ValueError`` naming the shape for what is no such pair, NaN, infinity, an H that is not
    symmetric or has a negative diagonal, and an unknown order.
    """
    W = torch.as_tensor(weight)
    metric = checked_metric(H)
    if W.ndim != 2 or not W.numel() or W.shape[1] != len(metric):
        raise ValueError(
            f"weights of shape {tuple(W.shape)} do not fit a metric of {tuple(metric.shape)}"
        )
    if not bool(torch.isfinite(W).all()):
        raise ValueError(f"the weights of shape {tuple(W.shape)} hold NaN or infinity")
    if order not in ORDERS:
        raise ValueError(f"the order must be one of {', '.join(ORDERS)}, not {order!r}")
    if not 0 <= damping < float("inf"):
        raise ValueError(f"the damping must be 0 or more, not {damping}")
    damped = damp(metric, damping)
    places = decision_order(damped, order)
    if blocks is not None:
        places = _together(places, torch.as_tensor(blocks))
    R, damped = factor(damped, places)
    diagonal = torch.diagonal(R)
    return Problem(
        weight=W[:, places].to(dtype).contiguous(),
        U=(R / diagonal[:, None]).to(dtype).contiguous(),
        squares=(diagonal**2).to(dtype).contiguous(),
        order=places,
        H=damped,
        rows=None if outer is None else row_factor(outer),
    )


def checked_metric(H: Any) -> Tensor:
    """``H`` as symmetric float64 (n, n). Raises ``ValueError`` as ``problem`` does."""
    metric = torch.as_tensor(H).to(torch.float64)
    shape = tuple(metric.shape)
    if metric.ndim != 2 or shape[0] != shape[1] or not metric.numel():
        raise ValueError(f"the metric must be square, not of shape {shape}")
    if not bool(torch.isfinite(metric).all()):
        raise ValueError(f"the metric of shape {shape} holds NaN or infinity")
    if float((metric - metric.T).abs().max()) > 1e-6 * float(metric.abs().max()):
        raise ValueError(f"the metric of shape {shape} is not symmetric")
    if bool((torch.diagonal(metric) < 0).any()):
        raise ValueError(f"the metric of shape {shape} has a negative diagonal")
    return (metric + metric.T) / 2


def _together(places: Tensor, blocks: Tensor) -> Tensor:
    """``places`` with the columns of each block side by side, in the order that they have."""
    mine = blocks[places]
    ranks = torch.arange(len(places), dtype=torch.float64)
    mean = torch.zeros(int(blocks.max()) + 1, dtype=torch.float64).index_add(0, mine, ranks)
    mean /= torch.bincount(mine, minlength=len(mean)).clamp_min(1)
    # By the mean, then by the block (two may have one mean); what is stable keeps the rest.
    by_block = torch.argsort(mine, stable=True)
    return places[by_block[torch.argsort(mean[mine[by_block]], stable=True)]]


def objective(weight: Tensor, values: Tensor, H: Tensor) -> Tensor:
    """(m,) float64: (w − ŵ) H (w − ŵ)ᵀ of each row."""
    error = (weight.double() - values.double()).contiguous()
    return ((error @ H) * error).sum(dim=1)

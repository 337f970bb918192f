"""What the beams of K-best offer, compiled by Inductor where there is a C++ compiler."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch

Box = tuple[torch.Tensor, torch.Tensor] | None


def _offers(
    centre: torch.Tensor,
    distance: torch.Tensor,
    square: torch.Tensor,
    box: Box,
    numbers: torch.Tensor,
    steps: list[float],
    mask: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Costs, coefficients and keys (children, m·K), as one function for Inductor to make one pass of."""
    near = centre.round()
    if box is not None:
        near = torch.maximum(torch.minimum(near, box[1]), box[0])
    gap = centre - near
    side = torch.copysign(torch.ones((), dtype=gap.dtype), gap)
    if box is not None:
        beyond = near + side
        side = torch.where((beyond < box[0]) | (beyond > box[1]), -side, side)
    gap = gap * side
    costs, choices = [], []
    for step in steps:
        off, x = gap - step, near + side * step
        cost = off * off * square + distance
        if box is not None:
            cost = cost.masked_fill((x < box[0]) | (x > box[1]), torch.inf)
        costs.append(cost)
        choices.append(x)
    cost = torch.stack(costs)
    return cost, torch.stack(choices), (cost.view(numbers.dtype) & ~mask) | numbers


@cache
def compiled_offers() -> Any:
    """``_offers`` through Inductor, tried once; None where that fails."""
    offers = torch.compile(_offers, dynamic=False)
    try:
        numbers = torch.zeros(2, 2, dtype=torch.int32)
        offers(torch.zeros(2), torch.zeros(2), torch.ones(()), None, numbers, [0.0, 1.0], 1)
    except Exception as error:
        # Whatever Inductor raises without a C++ compiler, the answer is the same without it.
        reason = str(error).splitlines()[0]
        warnings.warn(f"k-best runs uncompiled: {reason}", RuntimeWarning, stacklevel=2)
        return None
    return offers

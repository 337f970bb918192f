"""What all decoders see of a grid: steps, offsets and box, in the problem's order and precision."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cllm.compress.grids import Grid
from cllm.compress.problem import Problem


@dataclass(frozen=True, eq=False)
class Points:
    """The points offset + step · q with low ≤ q ≤ high: ``step`` and ``offset`` (m, n) in the problem's
    order, no step 0. The bounds are infinite where any integer is allowed."""

    step: Tensor
    offset: Tensor
    low: float
    high: float

    def coordinates(self, centre: Tensor, column: int) -> Tensor:
        """Real codes of centres (m, …) of one column."""
        shape = (-1,) + (1,) * (centre.ndim - 1)
        return (centre - self.offset[:, column].view(shape)) / self.step[:, column].view(shape)

    def values(self, codes: Tensor, column: int) -> Tensor:
        """The points of codes (m, …) of one column."""
        shape = (-1,) + (1,) * (codes.ndim - 1)
        return self.offset[:, column].view(shape) + self.step[:, column].view(shape) * codes

    def rows(self, part: slice) -> Points:
        """The points of some rows."""
        return Points(self.step[part], self.offset[part], self.low, self.high)


def points_of(problem: Problem, grid: Grid) -> Points:
    """The points of ``grid`` for the rows of ``problem``."""
    dtype = problem.weight.dtype
    groups = grid.spec.group_of(grid.columns)[problem.order]
    step = grid.scale.to(dtype)[:, groups]
    # Where the scale is 0 all codes mean the same; any step will do.
    step = torch.where(step == 0, torch.finfo(dtype).tiny ** 0.5, step)
    offset = torch.zeros_like(step) if grid.offset is None else grid.offset.to(dtype)[:, groups]
    return Points(step, offset, float(grid.spec.low), float(grid.spec.high))

"""Pruning with the error made up for: SparseGPT, in the notation of the decoders.

Setting a weight to 0 is a decision like rounding it: the columns that are still open move so as to make up
for it (Hassibi & Stork's optimal brain surgeon, 1993, one column at a time). With U and the squares of
H = Uᵀ diag(squares) U, a weight whose centre is c costs squares · c² to be dropped, which is
w² / [H⁻¹]_jj over the columns that are open, SparseGPT's measure.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cllm.compress.decoders.lattice_frame import Points, points_of
from cllm.compress.grids import Grid, GridSpec, range_grid
from cllm.compress.problem import Problem
from cllm.compress.scales import MORE, SHRINKS

BLOCK = 128
"""Columns whose least dear weights are chosen at once, over all rows (SparseGPT's B_s)."""


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """What is dropped: ``share`` of the weights of each block of columns, or, with ``of``, that share of
    each ``of`` neighbours in a row (2:4)."""

    share: float
    of: int = 0

    @property
    def order(self) -> str | None:
        """The order of decision that the pattern asks for; ``None`` if it takes any."""
        return "natural" if self.of else None


def parse_pattern(text: str) -> Pattern:
    """``50%``, ``0.5`` or ``2:4`` (two of four are dropped). Raises ``ValueError``."""
    wrong = ValueError(f"--prune takes a share, as in 50% or 0.5, or 2:4, not {text!r}")
    if text.strip() == "2:4":
        return Pattern(share=0.5, of=4)
    number = text.strip()
    try:
        share = float(number.removesuffix("%")) / (100 if number.endswith("%") else 1)
    except ValueError:
        raise wrong from None
    if not 0 < share < 1:
        raise wrong
    return Pattern(share=share)


def sparse_gpt(
    problem: Problem, pattern: Pattern, points: Points | None = None
) -> tuple[Tensor, Tensor]:
    """Kept (m, n) bool and, where kept, what stands there, columns in the problem's order: values, or
    codes of ``points``.

    Algorithm 1 of Frantar & Alistarh, "SparseGPT", 2023, from the last column to the first: what is kept
    takes its centre as it is, or the point nearest to it, so that with ``points`` pruning and rounding
    make up for each other. Raises ``ValueError`` where a pattern of neighbours does not divide the columns.
    """
    m, n = problem.shape
    if pattern.of and n % pattern.of:
        raise ValueError(
            f"a pattern of {pattern.of} neighbours does not divide {n} columns; give a share"
        )
    size = pattern.of or BLOCK
    centres, U = problem.weight.T.clone(memory_format=torch.contiguous_format), problem.U
    errors, results = torch.empty_like(centres), torch.zeros_like(centres)
    kept = torch.empty(n, m, dtype=torch.bool)
    for stop in range(n, 0, -size):
        begin = max(0, stop - size)
        part = slice(begin, stop)
        # Where the block's columns would go if all that is open made up for what was decided.
        moved = centres[part] - problem.weight[:, part].T
        moved = torch.linalg.solve_triangular(U[part, part], moved, upper=True, unitriangular=True)
        costs = problem.squares[part, None] * (problem.weight[:, part].T + moved).square()
        kept[part] = _kept(costs, pattern)
        for j in range(stop - 1, begin - 1, -1):
            centre = centres[j] + U[j, j + 1 : stop] @ errors[j + 1 : stop]
            if points is None:
                result = value = centre
            else:
                result = points.coordinates(centre, j).round_().clamp_(points.low, points.high)
                value = points.values(result, j)
            results[j] = torch.where(kept[j], result, 0.0)
            errors[j] = problem.weight[:, j] - torch.where(kept[j], value, 0.0)
        if begin:
            centres[:begin].addmm_(U[:begin, part], errors[part])
    return kept.T.contiguous(), results.T.contiguous()


def _kept(costs: Tensor, pattern: Pattern) -> Tensor:
    """(columns, m) bool: all but the share that costs least."""
    if pattern.of:
        drop = round(pattern.share * pattern.of)
        places = costs.argsort(dim=0, stable=True)[:drop]
        return torch.ones_like(costs, dtype=torch.bool).scatter_(0, places, False)
    drop = round(pattern.share * costs.numel())
    places = costs.flatten().argsort(stable=True)[:drop]
    kept = torch.ones(costs.numel(), dtype=torch.bool)
    kept[places] = False
    return kept.view(costs.shape)


def prune_values(problem: Problem, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Kept (m, n) bool and the values (m, n), 0 where not, columns in the original order."""
    kept, values = sparse_gpt(problem, pattern)
    return problem.back(kept), problem.back(values)


def prune_on_grid(
    problem: Problem, pattern: Pattern, spec: GridSpec
) -> tuple[Tensor, Grid, Tensor]:
    """Kept (m, n), the grid, and the codes (m, n) of what is kept, columns in the original order.

    Of some shares of each group's range the one at which the row comes nearest under H is taken, row by
    row, all pruned alike.
    """
    weight = problem.original()
    best: tuple[Tensor, Grid, Tensor] | None = None
    least = torch.full((len(weight),), torch.inf, dtype=torch.float64)
    for shrink in SHRINKS.get(spec.bits, MORE):
        grid = range_grid(weight, spec, shrink)
        kept, codes = sparse_gpt(problem, pattern, points_of(problem, grid))
        kept, codes = problem.back(kept), problem.back(codes).long()
        value = problem.objective(torch.where(kept, grid.values(codes), 0.0))
        better = (value < least)[:, None]
        least = torch.minimum(value, least)
        if best is None:
            best = kept, grid, codes
            continue
        offset = None
        if grid.offset is not None and best[1].offset is not None:
            offset = torch.where(better, grid.offset, best[1].offset)
        mixed = Grid(spec, grid.columns, torch.where(better, grid.scale, best[1].scale), offset)
        best = torch.where(better, kept, best[0]), mixed, torch.where(better, codes, best[2])
    assert best is not None
    return best

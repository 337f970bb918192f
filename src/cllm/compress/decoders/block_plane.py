"""Nearest plane by blocks: each block of columns to the nearest point of its lattice, errors fed back."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from cllm.compress.lattices.blocks import Kind, runs
from cllm.compress.problem import Problem
from cllm.lattice import E8, Leech, RootLattice, Zn

Nearest = Callable[[Kind, Tensor, slice], Tensor]
"""(kind, centres (m, width) in the lattice's units of length, original columns) to points (m, width)."""


def block_plane(problem: Problem, lattice: str, steps: Tensor, nearest: Nearest) -> Tensor:
    """Points (m, n) float64, in units of length of their lattices, columns in the original order.

    ``steps`` (m, n) or (1, n): the length of a unit in the weights, original order. Blocks must lie
    together in the problem's order (``problem(blocks=…)``). The metric is factored in blocks, H = UᵀDU
    with unit blocks on U's diagonal, and a block is decided as if its D were a multiple of the identity:
    LDLQ of QuIP# (Tseng et al., 2024), and GPTQ where blocks are columns.
    """
    place = torch.empty_like(problem.order)
    place[problem.order] = torch.arange(len(place))
    found = []
    for run in runs(lattice, problem.shape[1]):
        for start in range(run.start, run.stop, run.kind.width):
            found.append((run.kind, place[start : start + run.kind.width], start))
    U, W = problem.U.double(), problem.weight.double()
    errors = torch.zeros_like(W)
    out = torch.empty_like(W)
    for kind, columns, start in sorted(found, key=lambda item: -int(item[1].max())):
        begin, end = int(columns.min()), int(columns.max()) + 1
        assert end - begin == kind.width, "a block's columns lie together"
        # R e of the block's rows is U_bb (e_b + U_bb⁻¹ U_b,later e_later).
        pull = U[begin:end, end:] @ errors[:, end:].T
        pull = torch.linalg.solve_triangular(
            U[begin:end, begin:end], pull, upper=True, unitriangular=True
        )
        original = slice(start, start + kind.width)
        step = steps[:, original].double()
        centres = W[:, columns] + pull.T[:, columns - begin]
        points = nearest(kind, centres / step, original)
        out[:, original] = points
        errors[:, columns] = W[:, columns] - points * step
    return out


def nearest_points(kind: Kind, centres: Tensor, columns: slice) -> Tensor:
    """The nearest points of the whole lattice."""
    points: Tensor = lattice_of(kind).nearest(centres.contiguous())
    return points


@cache
def lattice_of(kind: Kind) -> RootLattice:
    """The lattice with its decoder."""
    return {1: lambda: Zn(1), 8: E8, 24: Leech}[kind.width]()

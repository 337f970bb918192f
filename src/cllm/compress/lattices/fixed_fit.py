"""Weights to fixed-rate codebooks: blocks one after the other with errors fed back, scales by trial."""

from __future__ import annotations

import torch
from torch import Tensor

from cllm.compress.decoders.block_plane import block_plane
from cllm.compress.grids import as_stored
from cllm.compress.lattices.blocks import Kind, runs
from cllm.compress.lattices.fixed import FixedMatrix, FixedSpec, index_of, nearest_codes, points_of
from cllm.compress.problem import Problem

# A unit of the lattice over a row's spread that is best for normal weights, and how far around it is tried.
_UNITS = {2: 1.01, 3: 0.586, 4: 0.338, 8: 0.0265}
_TRIED = (1.0, 0.92, 1.09, 0.85, 1.18)


def fit_fixed(problem: Problem, spec: FixedSpec, *, by_metric: bool = True) -> FixedMatrix:
    """The matrix of ``spec`` near ``problem``, whose blocks lie together.

    Each group's scale is a share of its spread: of some tried for all groups of a row, the one at which the
    row comes out nearest under H; then, twice, the least-squares scale of the row for its points. Blocks
    are decided by ``block_plane``, or each for itself without ``by_metric``.
    """
    weight = problem.original().double()
    n = weight.shape[1]
    group = torch.from_numpy(spec.group_of(n))
    spread = _spread(weight, group)
    if not by_metric:
        eye = torch.eye(n, dtype=problem.U.dtype)
        problem = Problem(problem.weight, eye, torch.ones(n), problem.order, torch.eye(n).double())

    def decide(scales: Tensor) -> Tensor:
        def nearest(kind: Kind, centres: Tensor, columns: slice) -> Tensor:
            return nearest_codes(kind, centres, spec.bits)

        steps = scales[:, group]
        # A group of zeros has no scale, and any point will do.
        return block_plane(problem, spec.lattice, torch.where(steps > 0, steps, 1.0), nearest)

    best_scales = as_stored(_UNITS[spec.bits] * spread)
    best = decide(best_scales)
    least = problem.objective(best * best_scales[:, group])

    def offer(scales: Tensor) -> None:
        nonlocal best, best_scales, least
        points = decide(scales)
        value = problem.objective(points * scales[:, group])
        better = (value < least)[:, None]
        best = torch.where(better, points, best)
        best_scales = torch.where(better, scales, best_scales)
        least = torch.minimum(value, least)

    for share in _TRIED[1:]:
        offer(as_stored(share * _UNITS[spec.bits] * spread))
    for _ in range(2):
        values = best * best_scales[:, group]
        turned = values @ problem.H
        factor = (turned * weight).sum(dim=1) / (turned * values).sum(dim=1).clamp_min(1e-30)
        offer(as_stored(best_scales * factor.clamp(0.5, 1.5)[:, None]))
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    for run in runs(spec.lattice, n):
        part = best[:, run.start : run.stop].reshape(-1, run.kind.width)
        found = index_of(run.kind, part, spec.bits)
        assert float((points_of(run.kind, found, spec.bits) - part).abs().max()) < 1e-6
        codes[:, run.start : run.stop] = found.reshape(len(weight), -1)
    return FixedMatrix(spec, codes, best_scales.to(torch.float16))


def _spread(weight: Tensor, group: Tensor) -> Tensor:
    """(m, groups): root mean square of each group."""
    sums = torch.zeros(len(weight), int(group.max()) + 1, dtype=weight.dtype)
    sums.index_add_(1, group, weight.square())
    return (sums / torch.bincount(group)).sqrt()

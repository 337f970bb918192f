"""Rounding to the nearest, and Babai's nearest plane, which is GPTQ."""

from __future__ import annotations

import torch
from torch import Tensor

from cllm.compress.decoders.columns_kernel import kernel_or_none
from cllm.compress.decoders.lattice_frame import Points
from cllm.compress.problem import Problem

BLOCK = 32


def rtn(problem: Problem, points: Points) -> Tensor:
    """Each weight to its nearest point, whatever the metric: codes (m, n) in the problem's order."""
    real = (problem.weight - points.offset) / points.step
    return real.round().clamp(points.low, points.high)


def babai(problem: Problem, points: Points, *, kernel: bool = True) -> Tensor:
    """Nearest plane with clipping: codes (m, n) in the problem's order.

    Babai (Combinatorica 6, 1986) on the lattice of the points under H, clipped at each step, from the
    last column to the first. It is GPTQ (Frantar et al., 2022) in another notation (Chen et al., "The
    Geometry of LLM Quantization", 2025, theorem 1): GPTQ's updated weight is Babai's centre
    w_i + Σ_{j>i} U_ij (w_j − ŵ_j). ``kernel``: by the compiled one where there is a C++ compiler, else by
    passes of torch, which decide alike; sums may be rounded differently.
    """
    compiled = kernel_or_none(problem.weight.dtype) if kernel else None
    if compiled is not None:
        return compiled.nearest(problem.weight, problem.U, points)
    return _passes(problem, points)


def _passes(problem: Problem, points: Points) -> Tensor:
    """A block's errors reach the other columns by one matrix product."""
    n = problem.shape[1]
    # Columns as rows, so that what is decided at once lies together. A copy even of a single row, whose
    # transpose is contiguous as it is.
    centres, U = problem.weight.T.clone(memory_format=torch.contiguous_format), problem.U
    codes, errors = torch.empty_like(centres), torch.empty_like(centres)
    for stop in range(n, 0, -BLOCK):
        begin = max(0, stop - BLOCK)
        for j in range(stop - 1, begin - 1, -1):
            centre = centres[j]
            if j + 1 < stop:
                centre = centre + U[j, j + 1 : stop] @ errors[j + 1 : stop]
            codes[j] = points.coordinates(centre, j).round_().clamp_(points.low, points.high)
            errors[j] = problem.weight[:, j] - points.values(codes[j], j)
        if begin:
            centres[:begin].addmm_(U[:begin, begin:stop], errors[begin:stop])
    return codes.T.contiguous()

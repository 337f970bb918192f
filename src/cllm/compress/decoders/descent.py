"""Coordinate descent: what a decoder decided is finished one code at a time, never to the worse."""

from __future__ import annotations

import torch
from torch import Tensor

from cllm.compress.decoders.columns_kernel import kernel_or_none
from cllm.compress.decoders.lattice_frame import Points
from cllm.compress.problem import Problem

BLOCK = 32


def descend(
    problem: Problem, points: Points, codes: Tensor, sweeps: int = 2, *, kernel: bool = True
) -> Tensor:
    """Codes (m, n), in the problem's order, no worse than ``codes`` in any row.

    Each sweep gives every code in turn the value of least objective, all others fixed (coordinate
    descent on a box; Behdin et al., "QuantEase", 2023, use it from the start). A sweep ends early when
    nothing moved. ``kernel``: as in ``babai``.
    """
    H = problem.ordered_metric
    compiled = kernel_or_none(problem.weight.dtype) if kernel else None
    if compiled is not None:
        return compiled.descend(problem.weight, H, points, codes, sweeps)
    return _passes(problem.weight, H, points, codes, sweeps)


def _passes(weight: Tensor, H: Tensor, points: Points, codes: Tensor, sweeps: int) -> Tensor:
    n = weight.shape[1]
    codes = codes.T.clone(memory_format=torch.contiguous_format)
    step, offset = points.step.T.contiguous(), points.offset.T.contiguous()
    errors = weight.T - (offset + step * codes)
    for _ in range(sweeps):
        moved = False
        for begin in range(0, n, BLOCK):
            part = slice(begin, min(begin + BLOCK, n))
            gradient = H[part] @ errors
            for j in range(part.start, part.stop):
                i = j - begin
                # The objective in this code is a parabola; its box is convex, so clipping its minimum is
                # exact once rounded.
                shift = gradient[i] / (H[j, j] * step[j])
                new = (codes[j] + shift).round_().clamp_(points.low, points.high)
                change = (new - codes[j]) * step[j]
                # Ties stay: a move must pay for itself.
                gain = change * (2 * gradient[i] - H[j, j] * change)
                change = torch.where(gain > 0, change, 0.0)
                if not bool(change.any()):
                    continue
                moved = True
                codes[j] = torch.where(gain > 0, new, codes[j])
                errors[j] -= change
                gradient -= torch.outer(H[part, j], change)
        if not moved:
            break
    return codes.T.contiguous()

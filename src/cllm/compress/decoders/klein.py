"""Klein's randomised nearest plane, for comparison: many random descents, the best one kept."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cllm.compress.decoders.lattice_frame import Points
from cllm.compress.decoders.nearest import babai
from cllm.compress.problem import Problem, objective


def klein(problem: Problem, points: Points, trials: int, seed: int = 0) -> Tensor:
    """Codes (m, n): the best of Babai's and ``trials`` random descents, in the problem's order.

    Klein, "Finding the closest lattice vector when it's unusually close", SODA 2000: at each column the
    code is drawn from a discrete Gaussian around the centre, here between the two codes beside it, as
    after clipping no others matter. The Gaussian's width follows Liu, Ling & Stehlé (IEEE Trans. Inf.
    Theory 57, 2011): A = log ρ / min r², with ρ from trials = (eρ)^(2n/ρ).
    """
    m, n = problem.shape
    generator = torch.Generator().manual_seed(seed)
    best = babai(problem, points)
    W, H = problem.weight, problem.H[problem.order][:, problem.order]
    value = objective(W, points.offset + points.step * best, H)
    sizes = problem.squares * points.step.square().mean(dim=0)
    sharpness = math.log(_rho(trials, n)) / sizes.min()
    for _ in range(trials):
        codes, errors = torch.empty_like(W), torch.zeros_like(W)
        for j in range(n - 1, -1, -1):
            centre = W[:, j] + errors[:, j + 1 :] @ problem.U[j, j + 1 :]
            real = points.coordinates(centre, j)
            below = real.floor()
            gap = real - below
            pull = sharpness * sizes[j] * ((1 - gap).square() - gap.square())
            upper = torch.rand(m, generator=generator, dtype=W.dtype) < torch.sigmoid(-pull)
            codes[:, j] = (below + upper).clamp_(points.low, points.high)
            errors[:, j] = W[:, j] - points.values(codes[:, j], j)
        found = objective(W, points.offset + points.step * codes, H)
        better = found < value
        value = torch.where(better, found, value)
        best = torch.where(better[:, None], codes, best)
    return best


def _rho(trials: int, n: int) -> float:
    """ρ > 1 with trials = (eρ)^(2n/ρ), by bisection on the falling branch."""
    low, high = 1.0 + 1e-9, 1e9
    for _ in range(200):
        middle = math.sqrt(low * high)
        if 2 * n / middle * (1 + math.log(middle)) > math.log(max(trials, 2)):
            low = middle
        else:
            high = middle
    return high

"""The error that a decoder is to be expected to make, from the Gram–Schmidt profile of the metric alone.

With H = Uᵀ diag(squares) U the error of nearest plane is Σ squares_j e_j², e_j the distance from centre j
to its point. Inside the grid e_j is as good as uniform on a cell, step²/12 on average; centres that the
errors before have moved beyond the box add what they overshoot by. Entropy-coded integers have no box, and
a column that varies less than rounding costs stays at 0 (the water level).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cllm.compress.decoders import Points, points_of
from cllm.compress.grids import GridSpec, range_grid
from cllm.compress.problem import Problem
from cllm.compress.scales import MORE, SHRINKS


@dataclass(frozen=True, eq=False)
class Expected:
    """``squares`` and ``means`` (m, n): expected e_j² and e_j of each row and column, in the problem's
    order; ``error`` (m,): expected objective of each row."""

    squares: Tensor
    means: Tensor
    error: Tensor

    def draw(self, problem: Problem, generator: torch.Generator) -> Tensor:
        """An error w − ŵ (m, n) as it may turn out, columns in the original order: independent e_j,
        uniform with these means and variances, carried back through U."""
        unit = 2 * torch.rand(self.squares.shape, generator=generator) - 1
        variances = (self.squares - self.means.square()).clamp_min(0)
        distances = self.means + unit * (3 * variances).sqrt()
        solved = torch.linalg.solve_triangular(
            problem.U.float(), distances.T.float(), upper=True, unitriangular=True
        )
        return problem.back(solved.T)


def expected_on_grid(problem: Problem, spec: GridSpec) -> Expected:
    """Of nearest plane on that grid of those ``search`` tries which should be best, row by row."""
    weight = problem.original()
    found: Expected | None = None
    for shrink in SHRINKS.get(spec.bits, MORE):
        new = expected_in_box(problem, points_of(problem, range_grid(weight, spec, shrink)))
        if found is None:
            found = new
            continue
        better = new.error < found.error
        found = Expected(
            torch.where(better[:, None], new.squares, found.squares),
            torch.where(better[:, None], new.means, found.means),
            torch.where(better, new.error, found.error),
        )
    assert found is not None
    return found


def expected_in_box(problem: Problem, points: Points) -> Expected:
    """Of nearest plane on ``points``.

    A centre is its weight less Σ_{j>i} (U⁻¹)_ij e_j over the columns decided before. It is taken to be
    normal, and the e_j to be independent, with the means that overload gives them.
    """
    n = problem.shape[1]
    inverse = torch.linalg.solve_triangular(
        problem.U.double(), torch.eye(n, dtype=torch.float64), upper=True, unitriangular=True
    )
    spread = inverse.square()
    step = points.step.T.double().abs()
    ends = [
        points.offset.T.double() + points.step.T.double() * e for e in (points.low, points.high)
    ]
    low, high = torch.minimum(*ends), torch.maximum(*ends)
    weight = problem.weight.T.double()
    squares, means = torch.zeros_like(weight), torch.zeros_like(weight)
    variances = torch.zeros_like(weight)
    for j in range(n - 1, -1, -1):
        centre = weight[j] - inverse[j, j + 1 :] @ means[j + 1 :]
        variance = spread[j, j + 1 :] @ variances[j + 1 :]
        means[j], squares[j] = _in_box(centre, variance, step[j], low[j], high[j])
        variances[j] = (squares[j] - means[j].square()).clamp_min(0)
    error = (problem.squares.double()[:, None] * squares).sum(0)
    return Expected(squares.T.float().contiguous(), means.T.float().contiguous(), error)


def _in_box(
    centre: Tensor, variance: Tensor, step: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:
    """E[e] and E[e²] of a normal centre: 0 and step²/12 within half a step of the box, beyond it the
    distance to its end."""
    above, right, more = _beyond(centre - high, variance, step / 2)
    below, left, less = _beyond(low - centre, variance, step / 2)
    inside = (1 - above - below).clamp_min(0) * step.square() / 12
    return right - left, inside + more + less


def _beyond(mean: Tensor, variance: Tensor, limit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """P(x > limit), E[x; x > limit] and E[x²; x > limit] of a normal x."""
    sigma = variance.clamp_min(1e-24).sqrt()
    alpha = (limit - mean) / sigma
    share = 0.5 * torch.erfc(alpha / math.sqrt(2))
    density = sigma * torch.exp(-0.5 * alpha.square()) / math.sqrt(2 * math.pi)
    return (
        share,
        mean * share + density,
        (mean.square() + variance) * share + density * (mean + limit),
    )


def expected_coded(problem: Problem, bits: float) -> Expected:
    """Of nearest plane with one step for all columns whose integers have ``bits`` of entropy each."""
    weight = problem.weight.double()
    power = weight.square().mean(dim=0).numpy()
    n = problem.shape[1]
    inverse = torch.linalg.solve_triangular(
        problem.U.double(), torch.eye(n, dtype=torch.float64), upper=True, unitriangular=True
    )
    spread = inverse.square().numpy()
    low, high = -40.0, 40.0
    for _ in range(40):
        level = (low + high) / 2
        squares, variances = _water(power, spread, 2.0**level)
        rate = float(np.mean(_entropy(np.sqrt(variances) / 2.0**level)))
        low, high = (level, high) if rate > bits else (low, level)
    squares, _ = _water(power, spread, 2.0**high)
    columns = torch.from_numpy(squares)
    # Rows share a step, so that only what stays at 0 depends on a row's own size.
    rows = columns.expand(problem.shape)
    error = (rows * problem.squares.double()).sum(dim=1)
    return Expected(rows.float().contiguous(), torch.zeros(problem.shape), error)


def _water(power: np.ndarray, spread: np.ndarray, step: float) -> tuple[np.ndarray, np.ndarray]:
    """(n,) E[e²] of each column, at most the column's variance, and the variances of the centres."""
    n = len(power)
    squares, variances = np.zeros(n), np.zeros(n)
    for j in range(n - 1, -1, -1):
        variances[j] = power[j] + spread[j, j + 1 :] @ squares[j + 1 :]
        squares[j] = min(step * step / 12, variances[j])
    return squares, variances


def _entropy(ratio: np.ndarray) -> np.ndarray:
    """Bits of a rounded normal of so many steps' standard deviation."""
    edges = np.linspace(-60.5, 60.5, 122)
    small = np.clip(ratio, 1e-6, 12.0)
    below = torch.special.ndtr(torch.from_numpy(edges[None] / small[:, None])).numpy()
    shares = np.diff(below, axis=1).clip(1e-300)
    fine = np.log2(np.maximum(ratio, 1e-300) * math.sqrt(2 * math.pi * math.e))
    found: np.ndarray = np.where(ratio > 12.0, fine, -(shares * np.log2(shares)).sum(axis=1))
    return found

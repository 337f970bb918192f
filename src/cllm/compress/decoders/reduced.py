"""K-best on an LLL- or BKZ-reduced basis, where clipping does not come into it."""

from __future__ import annotations

import torch
from torch import Tensor

from cllm.compress.decoders.beam import k_best
from cllm.compress.decoders.lattice_frame import Points
from cllm.compress.problem import Problem, objective

LARGEST = 512
"""Columns of a basis that is reduced; more take minutes."""


def reduced_k_best(problem: Problem, points: Points, K: int, method: str = "lll") -> Tensor:
    """Codes (m, n) in the problem's order, of ``k_best``, or nearer where a reduced basis finds them.

    A reduced basis has no box: its answer counts only in rows where every code keeps to the grid's (LLL
    and clipping afterwards was measured to be worse than Babai). The lattice must be the same for all
    rows up to a factor, so that rows whose scales differ between groups keep ``k_best``'s answer.
    Needs ``fpylll``; wider than ``LARGEST``, the basis is taken as it is.
    """
    from cllm.lattice import closest, reduce

    plain = k_best(problem, points, K)
    ratio = points.step / points.step[:, :1]
    same = bool(torch.isclose(ratio, ratio[:1], rtol=1e-6).all())
    if not same or problem.shape[1] > LARGEST:
        return plain
    step = ratio[0].double()
    # Rows of the basis: what a code adds, under the metric. Coefficients of all rows are in units of
    # their own first step.
    R = problem.U.double() * problem.squares.double().sqrt()[:, None]
    basis = step[:, None] * R.T
    targets = ((problem.weight - points.offset) / points.step[:, :1]).double() @ R.T
    # A row without a step (a constant) is on its grid anyway, and far outside of any lattice's range.
    targets[(points.step[:, 0].abs() < 1e-12) | (targets.abs().amax(dim=1) > 2.0**40)] = 0
    found = reduce(basis.numpy(), method)
    transform = torch.from_numpy(found.transform.astype("float64"))
    answer = closest((transform @ basis).numpy(), targets.numpy(), "k-best", K=K)
    codes = (torch.as_tensor(answer.coefficients).double() @ transform).to(plain.dtype)
    inside = ((codes >= points.low) & (codes <= points.high)).all(dim=1)
    H = problem.H[problem.order][:, problem.order]
    first = objective(problem.weight, points.offset + points.step * plain, H)
    second = objective(problem.weight, points.offset + points.step * codes, H)
    return torch.where((inside & (second < first))[:, None], codes, plain)

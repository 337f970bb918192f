"""Decoders: from a weight matrix, a metric and a grid to the integers that a file holds."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cllm.compress.decoders.beam import k_best
from cllm.compress.decoders.descent import descend
from cllm.compress.decoders.klein import klein
from cllm.compress.decoders.lattice_frame import Points, points_of
from cllm.compress.decoders.nearest import babai, rtn
from cllm.compress.decoders.reduced import reduced_k_best
from cllm.compress.grids import Grid
from cllm.compress.problem import Problem

METHODS = ("rtn", "babai", "k-best", "k-best-lll", "k-best-bkz", "klein")

__all__ = [
    "METHODS",
    "Decoder",
    "Points",
    "babai",
    "descend",
    "k_best",
    "klein",
    "points_of",
    "rtn",
]


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A way to choose codes.

    Attributes:
        method: one of ``METHODS``; ``babai`` is GPTQ.
        K: beams of ``k-best``, trials of ``klein``.
        sweeps: sweeps of coordinate descent afterwards.
    """

    method: str = "k-best"
    K: int = 16
    sweeps: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"the method must be one of {', '.join(METHODS)}, not {self.method!r}")
        if self.K < 1 or self.sweeps < 0:
            raise ValueError("beams are at least 1, sweeps at least 0")

    def __call__(self, problem: Problem, grid: Grid) -> Tensor:
        """Codes (m, n) int64 of ``grid`` for ``problem``, columns in the original order."""
        points = points_of(problem, grid)
        codes = self.decide(problem, points)
        if self.sweeps:
            codes = descend(problem, points, codes, self.sweeps)
        return problem.back(codes).long()

    def decide(self, problem: Problem, points: Points) -> Tensor:
        """Codes (m, n) in the problem's order, before descent."""
        if self.method == "rtn":
            return rtn(problem, points)
        if self.method == "babai" or (self.method == "k-best" and self.K == 1):
            return babai(problem, points)
        if self.method == "k-best":
            return k_best(problem, points, self.K)
        if self.method == "klein":
            return klein(problem, points, self.K)
        return reduced_k_best(problem, points, self.K, self.method.removeprefix("k-best-"))

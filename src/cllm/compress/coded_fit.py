"""Integers for the entropy coder: a matrix at a number of bytes, by nearest plane or K-best."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cllm.compress.coded import CodedMatrix, bits_like, column_steps, encode
from cllm.compress.decoders import Decoder, Points, babai, k_best, rtn
from cllm.compress.lattices.blocks import LATTICES
from cllm.compress.lattices.coding import LatticeMatrix
from cllm.compress.lattices.fit import LatticeWork
from cllm.compress.problem import Problem
from cllm.lattice.beam import Prices

_Decide = Callable[[Problem, Points], Tensor]
COLUMNS = ("uniform", "water")
Matrix = CodedMatrix | LatticeMatrix
# Integers stay well inside what the coder takes and float32 holds.
_LIMIT = float(2**22)
_TRIES = 7
# A size this near to what was asked for is near enough.
_NEAR = 0.997


@dataclass(frozen=True, kw_only=True)
class CodedSpec:
    """How integers are chosen.

    Attributes:
        price: what a bit may cost in squared distance, in the squared step times the metric; 0 weighs
            distance alone. 0.1155 = 2 ln 2 / 12 is the slope of rate against distortion at high rate.
        columns: ``uniform`` gives all columns one step; ``water`` scales them so that the factor's diagonal
            is flat, by which columns below the water level come out as zeros (reverse water-filling;
            WaterSIC, 2026).
        lattice: ``z``; or ``e8`` or ``leech`` for points of these in blocks of 8 or 24 columns, which the
            problem keeps together.
    """

    price: float = 0.12
    columns: str = "uniform"
    lattice: str = "z"

    def __post_init__(self) -> None:
        if not 0 <= self.price <= 1:
            raise ValueError(f"the price lies between 0 and 1, not {self.price}")
        if self.columns not in COLUMNS:
            raise ValueError(f"columns must be {' or '.join(COLUMNS)}, not {self.columns!r}")
        if self.lattice not in LATTICES:
            raise ValueError(f"the lattice is one of {', '.join(LATTICES)}, not {self.lattice!r}")


def fit_coded(
    problem: Problem, target: int, decoder: Decoder, spec: CodedSpec
) -> tuple[Matrix, bytes]:
    """The matrix whose bytes are at most ``target`` and as near to it as a few tries come.

    Raises ``ValueError`` naming the least possible where ``target`` is below it.
    """
    work, plain = _work(problem, spec, spec.price), _work(problem, spec, 0.0)
    zeros = work.zeros()
    empty = work.encode(zeros)
    if problem.weight.abs().max() == 0:
        return zeros, empty
    # A search by nearest plane first, which is cheap; the decoder starts from where it ends.
    quick = Decoder(method="rtn" if decoder.method == "rtn" else "babai")
    step = 4.13 * float(problem.weight.double().square().mean().sqrt())
    step *= 2.0 ** (-8 * target / problem.weight.numel())
    search = _Search(target, problem.weight.numel(), len(empty))
    stages = [(plain, quick)]
    if spec.price or decoder != quick:
        stages.append((work, decoder))
    for stage, method in stages:
        search.restart()
        for _ in range(_TRIES):
            matrix = stage.decode(method, step)
            search.offer(matrix, stage.encode(matrix))
            if search.done:
                break
            step = search.next_step()
        while search.best is None and search.seen[-1][1] > search.floor:
            step = 1.1 * search.last_step
            matrix = stage.decode(method, step)
            search.offer(matrix, stage.encode(matrix))
        step = search.last_step
        if spec.price:  # weighing bits saves some: a smaller step takes as many
            step *= 0.93
        work.last = plain.last
    if search.best is None:
        if target < len(empty):
            raise ValueError(
                f"{target:,} bytes are fewer than the {len(empty):,} that a matrix of {problem.shape} takes"
            )
        return zeros, empty
    return search.best


class _Search:
    """Looks for the step whose file is just below the target, by the secant of size over log step."""

    def __init__(self, target: int, count: int, floor: int) -> None:
        self.target, self.count, self.floor = target, count, floor
        self.restart()

    def restart(self) -> None:
        """Forget the sizes found, which another decoder does not share."""
        self.best: tuple[Matrix, bytes] | None = None
        self.seen: list[tuple[float, int]] = []

    @property
    def done(self) -> bool:
        """Whether the last one is near enough."""
        return _NEAR * self.target <= self.seen[-1][1] <= self.target

    @property
    def last_step(self) -> float:
        """The step that was tried last."""
        return 2.0 ** self.seen[-1][0]

    def offer(self, matrix: Matrix, data: bytes) -> None:
        """Take in a try."""
        self.seen.append((math.log2(matrix.step), len(data)))
        if len(data) <= self.target and (self.best is None or len(data) > len(self.best[1])):
            self.best = matrix, data

    def next_step(self) -> float:
        """Where the target should be, a little on the safe side."""
        wanted = self.target * (1 + _NEAR) / 2
        place, size = self.seen[-1]
        slope = -self.count / 8  # a bit for each weight and octave, fewer where many are 0
        if len(self.seen) > 1 and self.seen[-2][0] != place:
            (x0, y0), (x1, y1) = self.seen[-2:]
            slope = min(-0.02 * self.count / 8, (y1 - y0) / (x1 - x0))
        above = [p for p in self.seen if p[1] > wanted]
        below = [p for p in self.seen if p[1] <= wanted]
        if above and below:
            (x0, y0), (x1, y1) = max(above), min(below)
            return float(2.0 ** (x0 + (x1 - x0) * (y0 - wanted) / (y0 - y1)))
        return float(2.0 ** (place + max(-2.0, min(2.0, (wanted - size) / slope))))


def _work(problem: Problem, spec: CodedSpec, price: float) -> Any:
    octaves = _octaves(problem, spec.columns)
    if spec.lattice == "z":
        return _Work(problem, octaves, price)
    return LatticeWork(problem, spec.lattice, octaves, price)


class _Work:
    """Decodes one problem at any step."""

    def __init__(self, problem: Problem, octaves: np.ndarray, price: float) -> None:
        self.problem, self.octaves, self.price = problem, octaves, price
        self.last: np.ndarray | None = None

    def encode(self, matrix: CodedMatrix) -> bytes:
        """The bytes of a matrix."""
        return encode(matrix)

    def zeros(self) -> CodedMatrix:
        """The matrix of zeros."""
        return CodedMatrix(np.zeros(self.problem.shape, dtype=np.int64), 1.0, self.octaves)

    def decode(self, decoder: Decoder, step: float) -> CodedMatrix:
        """The integers at one step, in the original order."""
        step = float(np.float32(step))
        steps = torch.from_numpy(column_steps(step, self.octaves)).float()
        K = decoder.K if decoder.method == "k-best" else 1
        if decoder.method == "rtn":
            self.last = self._integers(steps, rtn)
        elif not self.price:
            plain = babai if K == 1 else lambda problem, points: k_best(problem, points, K)
            self.last = self._integers(steps, plain)
        else:
            if self.last is None:
                self.last = self._integers(steps, babai)
            self.last = self._priced(steps, K)
        return CodedMatrix(self.last, step, self.octaves)

    def _integers(self, steps: Tensor, decide: _Decide) -> np.ndarray:
        return self._each(steps, lambda problem, points, rows: decide(problem, points))

    def _priced(self, steps: Tensor, K: int) -> np.ndarray:
        """K-best that weighs bits as the entropy coder would count them beside the integers of before."""
        assert self.last is not None
        found, table = bits_like(self.last)
        order = self.problem.order
        classes = torch.from_numpy(found)[:, order]
        sizes = self.problem.squares.double() * steps[order].double().square()
        # Where the diagonal is not flat, the mean is that of what one more bit gains on the whole.
        unit = self.price * float(sizes.log().mean().exp())
        costs = torch.from_numpy(table * unit).to(self.problem.weight.dtype)

        def decide(problem: Problem, points: Points, rows: Tensor) -> Tensor:
            prices = Prices(classes=classes[rows].contiguous(), costs=costs)
            return k_best(problem, points, K, children=3 if K < 4 else 2, prices=prices)

        return self._each(steps, decide)

    def _each(
        self, steps: Tensor, decide: Callable[[Problem, Points, Tensor], Tensor]
    ) -> np.ndarray:
        """Integers (m, n), original order, as ``decide`` makes them of rows; block by block where rows are
        not alone."""
        whole, out = self.problem, torch.empty(self.problem.shape, dtype=torch.int64)
        line = steps[whole.order].to(whole.weight.dtype)

        def rows_of(problem: Problem, rows: Tensor) -> Tensor:
            zeros = torch.zeros_like(problem.weight)
            points = Points(line.expand(problem.shape), zeros, -_LIMIT, _LIMIT)
            out[rows] = problem.back(decide(problem, points, rows)).long()
            return out[rows] * steps

        if whole.rows is None:
            rows_of(whole, torch.arange(len(out)))
        else:
            weight = whole.original()
            whole.rows.each(weight, lambda rows, wanted: rows_of(whole.with_weight(wanted), rows))
        return out.numpy()


def _octaves(problem: Problem, columns: str) -> np.ndarray:
    """(n,) quarter octaves of the columns' steps, in the original order."""
    n = problem.shape[1]
    if columns == "uniform":
        return np.zeros(n, dtype=np.int64)
    logs = -0.5 * problem.back(problem.squares.double()).log2().numpy()
    return np.rint(4 * (logs - logs.mean())).astype(np.int64)

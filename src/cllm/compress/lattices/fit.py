"""Points of E8 and Leech blocks for the entropy coder, at any step."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cllm.compress.coded import CLASSES, LOWEST, column_steps, levels_of
from cllm.compress.decoders import Decoder
from cllm.compress.decoders.block_beam import Price, k_best_blocks
from cllm.compress.decoders.block_plane import block_plane, nearest_points
from cllm.compress.lattices.blocks import units
from cllm.compress.lattices.coding import LatticeMatrix, encode
from cllm.compress.problem import Problem

# Magnitudes that have a price of their own; larger ones grow by Elias' gamma code.
_SIZES = 512


class LatticeWork:
    """Decodes one problem, its blocks together, at any step; ``price`` of a bit as in ``CodedSpec``."""

    def __init__(self, problem: Problem, lattice: str, octaves: np.ndarray, price: float) -> None:
        self.problem, self.lattice, self.octaves, self.price = problem, lattice, octaves, price
        self.last: np.ndarray | None = None

    def encode(self, matrix: LatticeMatrix) -> bytes:
        """The bytes of a matrix."""
        return encode(matrix)

    def zeros(self) -> LatticeMatrix:
        """The matrix of zeros."""
        zeros = np.zeros(self.problem.shape, dtype=np.int64)
        return LatticeMatrix(self.lattice, zeros, 1.0, self.octaves)

    def decode(self, decoder: Decoder, step: float) -> LatticeMatrix:
        """The points at one step, in the original order."""
        step = float(np.float32(step))
        steps = torch.from_numpy(column_steps(step, self.octaves))
        if decoder.method == "k-best" and decoder.K > 1:
            if self.price and self.last is None:
                self.last = self._plane(steps, by_metric=True)
            price = self._cost(steps) if self.price else None
            codes = k_best_blocks(self.problem, self.lattice, steps, decoder.K, price=price)
            self.last = codes.long().numpy()
        else:
            self.last = self._plane(steps, by_metric=decoder.method != "rtn")
        return LatticeMatrix(self.lattice, self.last, step, self.octaves)

    def _plane(self, steps: Tensor, *, by_metric: bool) -> np.ndarray:
        problem = self.problem
        if not by_metric:
            n = problem.shape[1]
            eye = torch.eye(n, dtype=problem.U.dtype)
            problem = Problem(problem.weight, eye, torch.ones(n), problem.order, problem.H)
        points = block_plane(problem, self.lattice, steps[None], nearest_points)
        unit = torch.from_numpy(units(self.lattice, len(steps)))
        return (points / unit).round().long().numpy()

    def _cost(self, steps: Tensor) -> Price:
        assert self.last is not None
        sizes = self.problem.back(self.problem.squares.double()) * steps.square()
        unit = self.price * float(sizes.log().mean().exp())
        return price_like(self.last, unit, self.problem.weight.dtype)


def price_like(integers: np.ndarray, unit: float, dtype: torch.dtype) -> Price:
    """What integers cost beside ``integers`` (m, n), a bit being worth ``unit``.

    Their bits are counted given their parity: what the parity of a block and the sum of the last
    coordinate save is the same for all.
    """
    found, table = bits_like(integers)
    classes = torch.from_numpy(found.astype(np.int64))
    costs = torch.from_numpy(table * unit).to(dtype)
    last = costs.shape[1] - 1

    def price(column: int, part: slice, integers: Tensor) -> Tensor:
        size = integers.abs().clamp_(max=last).long()
        return costs[classes[part, column, None], size]

    return price


def bits_like(integers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Classes (m, n), and bits (classes, magnitudes) of integers beside ``integers`` of the same parity."""
    classes = levels_of(integers).classes()
    sizes = np.minimum(np.abs(integers), _SIZES - 1)
    found = np.bincount(
        classes.ravel() * np.int64(_SIZES) + sizes.ravel(), minlength=CLASSES * _SIZES
    )
    counts = found.reshape(CLASSES, _SIZES) + 24.0 * _normal()
    for parity in (0, 1):
        mine = counts[:, parity::2]
        mine /= mine.sum(axis=1, keepdims=True)
    bits = -np.log2(np.maximum(counts, 1e-30))
    bits[:, 1:] += 1
    return classes, bits


def _normal() -> np.ndarray:
    """(classes, sizes): shares of magnitudes of a normal distribution of each class's mean magnitude."""
    spread = 2.0 ** (np.arange(CLASSES)[:, None] / 3 + LOWEST) * np.sqrt(np.pi / 2)
    spread = np.maximum(spread, 0.3)
    shares = np.exp(-((np.arange(_SIZES) / spread) ** 2) / 2)
    shares[:, 0] /= 2
    return shares / shares.sum(axis=1, keepdims=True)

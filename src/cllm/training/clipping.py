"""The gradient's norm, which is also the check that it is finite, and its factor from clipping."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCKS = 64


class Norm:
    """The Euclidean norm of a flat gradient: one pass over it, which allocates nothing.

    It is taken of blocks first, whose number is fixed: a reduction to one number lets each thread
    allocate a place of its own, and gives other bits with another number of threads.
    """

    def __init__(self, like: Tensor, norms: Tensor | None = None) -> None:
        """For gradients of the device and precision of ``like``. ``norms``: where those of the blocks
        (BLOCKS + 1,) are put, if several processes take them."""
        self.norms = like.new_zeros(BLOCKS + 1) if norms is None else norms
        self.norm = like.new_zeros(())

    def __call__(self, grad_n: Tensor) -> float:
        """The norm of a flat gradient; not finite where one of its numbers is not, or where the sum of
        their squares leaves its precision."""
        self.take(grad_n, 0, BLOCKS + 1)
        return self.total()

    @staticmethod
    def begin_of(size: int, block: int) -> int:
        """Where a block of a gradient of ``size`` numbers begins. The last, ``BLOCKS``, is what is left
        over by blocks of the same length."""
        return size if block > BLOCKS else size // BLOCKS * block

    def take(self, grad_n: Tensor, first: int, last: int) -> None:
        """Take the norms of blocks ``first:last`` of a flat gradient."""
        same = min(last, BLOCKS)
        if first < same:
            begin, end = (self.begin_of(len(grad_n), block) for block in (first, same))
            blocks = grad_n[begin:end].view(same - first, -1)
            torch.linalg.vector_norm(blocks, dim=1, out=self.norms[first:same])
        if first <= BLOCKS < last:
            rest = grad_n[self.begin_of(len(grad_n), BLOCKS) :]
            torch.linalg.vector_norm(rest, out=self.norms[BLOCKS])

    def total(self) -> float:
        """The norm, after those of all blocks."""
        torch.linalg.vector_norm(self.norms, out=self.norm)
        return float(self.norm)


def clip_factor(norm: float, clip: float) -> float:
    """What brings a gradient of ``norm`` down to a norm of ``clip``; 0 never clips."""
    return min(clip / (norm + 1e-6), 1.0) if clip > 0 else 1.0

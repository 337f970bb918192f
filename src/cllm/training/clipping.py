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

    def __init__(self, like: Tensor) -> None:
        """For gradients of the device and precision of ``like``."""
        self.norms, self.norm = like.new_zeros(BLOCKS + 1), like.new_zeros(())

    def __call__(self, grad_n: Tensor) -> float:
        """The norm of a flat gradient; not finite where one of its numbers is not, or where the sum of
        their squares leaves its precision."""
        length = len(grad_n) // BLOCKS
        whole = length * BLOCKS
        blocks, rest = grad_n[:whole].view(BLOCKS, length), grad_n[whole:]
        torch.linalg.vector_norm(blocks, dim=1, out=self.norms[:BLOCKS])
        torch.linalg.vector_norm(rest, out=self.norms[BLOCKS])
        torch.linalg.vector_norm(self.norms, out=self.norm)
        return float(self.norm)


def clip_factor(norm: float, clip: float) -> float:
    """What brings a gradient of ``norm`` down to a norm of ``clip``; 0 never clips."""
    return min(clip / (norm + 1e-6), 1.0) if clip > 0 else 1.0

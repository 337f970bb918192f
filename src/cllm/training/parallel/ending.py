"""What ends a step, done by all workers: each adds up, and updates, a stretch of the arena.

Sum and update are elementwise and the norm is one of blocks (``cllm.training.clipping``), so that no bit
depends on who does which stretch: weights become what one process makes of them.
"""

from __future__ import annotations

from cllm.training.arena import ALIGN, Part
from cllm.training.clipping import BLOCKS, Norm
from cllm.training.parallel.shared import Shared
from cllm.training.update import Update


class Ending:
    """The share of worker ``number`` in the end of a step."""

    def __init__(self, update: Update, shared: Shared, number: int) -> None:
        self._optimizer, (self._sum, *self._others) = update.optimizer, shared.grads
        self.norm = Norm(self._sum, shared.norms)
        workers, size = len(shared.grads), len(self._sum)
        self._blocks = _stretch(BLOCKS + 1, number, workers)
        self._first, self._last = (self.norm.begin_of(size, block) for block in self._blocks)
        # Of the update: whole lines of memory, so that no two processes write to the same one.
        mine = (place * ALIGN for place in _stretch(-(-size // ALIGN), number, workers))
        self._parts: list[Part] = update.arena.parts(within=(next(mine), next(mine)))

    def add_up(self) -> None:
        """Add the workers' gradients, in their order, and take the norms of the sum's blocks."""
        mine = self._sum[self._first : self._last]
        for grad in self._others:
            mine.add_(grad[self._first : self._last])
        self.norm.take(self._sum, *self._blocks)

    def apply(self, factor: float, lr: float, count: int) -> None:
        """Make step ``count`` with ``factor`` times the sum, which is overwritten."""
        for part in self._parts:
            self._optimizer.update(part, part.of(self._sum), factor, lr, count)


def _stretch(size: int, number: int, count: int) -> tuple[int, int]:
    """First and last of ``size`` things that ``number`` of ``count`` takes."""
    return size * number // count, size * (number + 1) // count

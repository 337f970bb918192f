"""From a summed gradient to changed weights: the norm, clipping, the optimizer, the low-precision copy.

Two passes over memory: one reads the gradient and gives its norm, which is not finite where a number of
it is not; one reads gradient, moments and weights and writes them. Where the arithmetic is in a lower
precision, a third makes the weights' copy. None allocates memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from cllm.core.config import TrainConfig
from cllm.training.arena import Arena, Part
from cllm.training.clipping import Norm, clip_factor
from cllm.training.optimizer import OPTIMIZERS


class Update:
    """What ends a step on ``arena``."""

    def __init__(self, arena: Arena, config: TrainConfig) -> None:
        self.arena, self.clip = arena, config.clip
        self.optimizer = OPTIMIZERS[config.optimizer](config)
        self.norm = Norm(arena.grad)
        self._parts = arena.parts()

    def factor(self, norm: float, unscale: float) -> float:
        """What clipping multiplies ``unscale`` times a gradient of ``norm``, which must be finite, with."""
        assert math.isfinite(norm)
        return unscale * clip_factor(norm, self.clip)

    def apply(
        self,
        grad: Tensor,
        norm: float,
        unscale: float,
        lr: float,
        count: int,
        parts: Sequence[Part] | None = None,
    ) -> float:
        """Make step ``count`` (from 1) at rate ``lr`` with the gradient ``unscale`` times ``grad``, whose
        norm is ``norm``, which must be finite; ``grad`` is overwritten.

        ``parts``: the arena's, with other copies. Returns the factor of the gradient.
        """
        factor = self.factor(norm, unscale)
        for part in self._parts if parts is None else parts:
            self.optimizer.update(part, part.of(grad), factor, lr, count)
        return factor

"""From a summed gradient to changed weights: the norm, clipping, the optimizer, the low-precision copy.

Two passes over memory: one reads the gradient and gives its norm, which is not finite where a number of
it is not; one reads gradient, moments and weights and writes moments, weights and their copy. Compiled,
the second is one loop; not compiled, it goes chunk by chunk, each of which stays in the cache from the
first of its operations to the last. Neither allocates memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cllm.core.config import TrainConfig
from cllm.training.arena import Arena, Part
from cllm.training.clipping import Norm, clip_factor
from cllm.training.compiled import perhaps_compiled
from cllm.training.optimizer import OPTIMIZERS

CHUNK = 16 * 1024
"""Elements that are updated at a time by code that is not compiled: five buffers of 64 KiB."""


class Update:
    """What ends a step on ``arena``, compiled or not."""

    def __init__(self, arena: Arena, config: TrainConfig, *, compiled: bool) -> None:
        self.arena, self.clip = arena, config.clip
        self.optimizer = OPTIMIZERS[config.optimizer](config)
        self.norm = Norm(arena.grad)
        weights = arena.weights
        self._size = CHUNK if weights.device.type == "cpu" else 0
        self._fused = perhaps_compiled(self._all_parts, compiled) if compiled else None
        self._work = weights.new_empty(0 if compiled else self._size or len(arena.grad))
        self.parts = self.parts_of()
        numbers = 1 + len(self.optimizer.rates(0.0, 1))
        # Filled through NumPy: torch makes a new tensor of each number that it is handed.
        self._host = torch.zeros(numbers, dtype=weights.dtype)
        self._numbers = self._host.numpy()
        self.rates = self._host if weights.device.type == "cpu" else self._host.to(weights.device)

    def parts_of(self, copy: Tensor | None = None) -> list[Part]:
        """The arena as ``apply`` takes it; ``copy`` as in ``Arena.parts``."""
        return self.arena.parts(0 if self._fused is not None else self._size, copy)

    def apply(
        self,
        grad: Tensor,
        norm: float,
        unscale: float,
        lr: float,
        count: int,
        parts: Sequence[Part] | None = None,
    ) -> None:
        """Make step ``count`` (from 1) at rate ``lr`` with the gradient ``unscale`` times ``grad``, whose
        norm is ``norm``, which must be finite."""
        assert math.isfinite(norm)
        factor = unscale * clip_factor(norm, self.clip)
        self._numbers[:] = (factor, *self.optimizer.rates(lr, count))
        if self.rates is not self._host:
            self.rates.copy_(self._host)
        parts = self.parts if parts is None else parts
        if self._fused is not None:
            self._fused(parts, grad, self.rates)
            return
        for part in parts:
            size = len(part.weights)
            self.optimizer.update(part, part.of(grad), self.rates, self._work[:size])

    def _all_parts(self, parts: Sequence[Part], grad: Tensor, rates: Tensor) -> None:
        for part in parts:
            own = part.of(grad)
            self.optimizer.update(part, own, rates, torch.empty_like(own))

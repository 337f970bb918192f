"""A trainer's steps through the delayed pipeline: given in ahead, drained where something is scheduled.

The recurrence begins anew at each drain, so that drains belong to what a run computes: they are at the
multiples of ``eval_every`` and ``checkpoint_every`` and at the end, whoever looks. A run that is stopped
in between therefore goes back to its last drain, of which a copy is kept.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from cllm.core.config import TrainConfig
from cllm.training.feed import MicroBatches, target_count
from cllm.training.figures import StepResult
from cllm.training.pipeline.delayed import Delayed
from cllm.training.schedule import learning_rate
from cllm.training.snapshot import Standing
from cllm.training.step import TrainStep


class Ahead:
    """Steps of a run. ``batches_of`` gives a step's micro-batches, ``seed_of`` the seed of its dropout."""

    def __init__(
        self,
        step: TrainStep,
        config: TrainConfig,
        batches_of: Callable[[int], MicroBatches],
        seed_of: Callable[[int], int | None],
    ) -> None:
        self.config, self.batches_of, self.seed_of = config, batches_of, seed_of
        self._step, self._delayed = step, Delayed(step)
        self._targets = deque[int]()
        self._kept: Standing | None = None
        self._buffers: list[Tensor] = []

    def step(self, at: int) -> tuple[StepResult, int]:
        """Make step ``at``, after all before it; returns its result and number of targets."""
        delayed = self._delayed
        until = min(self._next_drain(at), at + delayed.delay + 1)
        for number in range(at + delayed.in_flight, until):
            batches = self.batches_of(number)
            self._targets.append(target_count(batches))
            delayed.submit(batches, learning_rate(self.config, number), self.seed_of(number))
        result = delayed.result()
        if not delayed.in_flight:
            delayed.settle()
        return result, self._targets.popleft()

    def keep(self, standing: Standing) -> None:
        """Keep a copy of where training stands, if it is drained."""
        if self._delayed.in_flight:
            return
        if not self._buffers:
            self._buffers = [torch.empty_like(tensor) for tensor in self._state()]
        for kept, tensor in zip(self._buffers, self._state(), strict=True):
            kept.copy_(tensor)
        self._kept = copy.deepcopy(standing)

    def rewind(self, patience: float | None = None) -> Standing | None:
        """End the pipeline and bring weights, moments and counters back to what was kept last; returns
        where that stood. ``None`` where a stage does not end within ``patience`` seconds, and could change
        them meanwhile."""
        if not self.close(patience):
            return None
        standing = self._kept
        assert standing is not None
        for tensor, kept in zip(self._state(), self._buffers, strict=True):
            tensor.copy_(kept)
        self._step.refresh()
        return standing

    def close(self, patience: float | None = None) -> bool:
        """End the threads; False where one does not end (see ``Delayed.close``)."""
        return self._delayed.close(patience)

    def _state(self) -> list[Tensor]:
        arena, counters = self._step.arena, self._step.counters
        return [arena.weights, *arena.moments.values(), *counters.values()]

    def _next_drain(self, at: int) -> int:
        train = self.config
        periods = (train.eval_every, train.checkpoint_every)
        return min(train.steps, *((at // period + 1) * period for period in periods))

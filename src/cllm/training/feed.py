"""From packed tokens to the micro-batches of a step, on the device."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from cllm.core.config import TrainConfig
from cllm.text.batches import IGNORED, BatchSource

MicroBatches = list[tuple[Tensor, Tensor]]


class Feed:
    """The micro-batches of a run's steps, in buffers that are made once and used again.

    What a call gives stays as it is until ``held`` more calls for the steps that follow it have been made
    and another begins.
    ``ahead``: the next step's are prepared on a thread meanwhile, which ends with ``close``.
    """

    def __init__(
        self, source: BatchSource, train: TrainConfig, *, held: int = 0, ahead: bool = False
    ) -> None:
        self.source, self.train = source, train
        shape = (2, train.accumulate, train.batch_size, source.context)
        self._buffers = [np.empty(shape, np.int64) for _ in range(1 + held + ahead)]
        self._filled = 0
        self._thread = ThreadPoolExecutor(1, "next batch") if ahead else None
        self._next: tuple[int, Future[MicroBatches]] | None = None

    def __call__(self, at: int) -> MicroBatches:
        """(ids, targets), each (B, T) int64, of the optimizer step that begins at step ``at``."""
        found = None
        if self._next is not None:
            number, future = self._next
            prepared = future.result()
            found = prepared if number == at else None
        if found is None:
            found = self._fill(at)
        if self._thread is not None:
            self._next = at + 1, self._thread.submit(self._fill, at + 1)
        return found

    def close(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._thread.shutdown()

    def _fill(self, at: int) -> MicroBatches:
        ids, targets = self._buffers[self._filled % len(self._buffers)]
        self._filled += 1
        first = at * self.train.accumulate
        for number, pair in enumerate(zip(ids, targets, strict=True)):
            self.source.batch(first + number, pair)
        device = self.train.device
        return [
            (torch.from_numpy(i).to(device), torch.from_numpy(t).to(device))
            for i, t in zip(ids, targets, strict=True)
        ]


def micro_batches(source: BatchSource, train: TrainConfig, at: int) -> MicroBatches:
    """The micro-batches of one step, in memory of their own."""
    return Feed(source, train)(at)


def target_count(batches: Sequence[tuple[Tensor, Tensor]]) -> int:
    """Targets that the loss counts on."""
    return sum(_counted(targets) for _, targets in batches)


def _counted(targets: Tensor) -> int:
    if targets.device.type == "cpu":  # NumPy's comparison takes a fifth of the time
        return int(np.count_nonzero(targets.numpy() != IGNORED))
    return int((targets != IGNORED).sum())

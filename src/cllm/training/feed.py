"""From packed tokens to the micro-batches of a step, on the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cllm.core.config import TrainConfig
from cllm.text.batches import IGNORED, BatchSource

MicroBatches = list[tuple[Tensor, Tensor]]


def micro_batches(source: BatchSource, train: TrainConfig, at: int) -> MicroBatches:
    """(ids, targets), each (B, T) int64, of the optimizer step that begins at step ``at``."""
    numbers = range(at * train.accumulate, (at + 1) * train.accumulate)
    return [
        (torch.from_numpy(ids).to(train.device), torch.from_numpy(targets).to(train.device))
        for ids, targets in map(source.batch, numbers)
    ]


def target_count(batches: Sequence[tuple[Tensor, Tensor]]) -> int:
    """Targets that the loss counts on."""
    return sum(_counted(targets) for _, targets in batches)


def _counted(targets: Tensor) -> int:
    if targets.device.type == "cpu":  # NumPy's comparison takes a fifth of the time
        return int(np.count_nonzero(targets.numpy() != IGNORED))
    return int((targets != IGNORED).sum())

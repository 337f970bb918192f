"""How many steps fit into a time budget: measured on steps that are undone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from statistics import median

import torch

from cllm.core.config import Config
from cllm.model.transformer import Transformer
from cllm.text.batches import BatchSource, evaluation_batches, evaluation_windows
from cllm.text.dataset import Dataset
from cllm.training.feed import micro_batches
from cllm.training.schedule import learning_rate, similarity_weight
from cllm.training.step import TrainStep

TRIAL_STEPS = 10
FEWEST_STEPS = 20
KEPT_BACK = 0.05
"""Share of the budget left for checkpoints, the report and a machine that slows down."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Seconds: of one step, of one whole validation, and of measuring (compilation included)."""

    step: float
    validation: float
    measuring: float

    def steps_in(self, seconds: float, eval_every: int) -> int:
        """Steps that ``seconds`` allow, with a validation every ``eval_every`` and three at the end."""
        left = seconds * (1 - KEPT_BACK) - 3 * self.validation
        return max(int(left / (self.step + self.validation / eval_every)), FEWEST_STEPS)


def measure_pace(config: Config, dataset: Dataset, model: Transformer, step: TrainStep) -> Pace:
    """Time some steps and a validation batch; weights and optimizer are as before afterwards."""
    train, context = config.train, config.model.context
    began = time.monotonic()
    source = BatchSource(dataset.train, context, train.batch_size, train.seed)
    with _undone(model, step):
        model.train()
        steps = []
        for at in range(TRIAL_STEPS + 2):
            before = time.monotonic()
            taken = micro_batches(source, train, at)
            step(taken, learning_rate(train, at), similarity_weight(train, at))
            steps.append(time.monotonic() - before)
    validation = 0.0
    if dataset.validation is not None:
        model.eval()
        batches = []
        windows = evaluation_windows(dataset.validation, context, step.rows_at_once)
        for ids, targets in islice(windows, 4):
            before = time.monotonic()
            float(step.evaluate(*(torch.from_numpy(a).to(train.device) for a in (ids, targets))))
            batches.append(time.monotonic() - before)
        count = evaluation_batches(dataset.validation, context, step.rows_at_once)
        validation = min(batches) * count
    measuring = time.monotonic() - began
    return Pace(step=median(steps[2:]), validation=validation, measuring=measuring)


@contextmanager
def _undone(model: Transformer, step: TrainStep) -> Iterator[None]:
    """Whatever the body changes in weights, optimizer and counters is changed back."""
    arena = step.arena
    live = [arena.weights, *arena.moments.values(), *step.counters.values(), *model.buffers()]
    before = [tensor.clone() for tensor in live]
    idle = step.lazy.state() if step.lazy is not None else None
    try:
        yield
    finally:
        for tensor, kept in zip(live, before, strict=True):
            tensor.copy_(kept)
        step.refresh()
        if step.lazy is not None and idle is not None:
            step.lazy.load(idle)

"""What goes into a training step beside its batch, and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from cllm.training.lazy_rows import InUse


@dataclass(frozen=True)
class StepResult:
    """What a step reports: mean loss in nats per target token (an estimate where it is trained on sampled
    softmax), gradient norm before clipping, whether the step was applied, and the similarity loss, which
    is no part of the loss but of the norm."""

    loss: float
    grad_norm: float
    applied: bool
    similarity: float | None = None


class Numbers(NamedTuple):
    """What changes from step to step: the factor of the loss, the inverse of its part that is fp16's, the
    learning rate, and which step it is (from 1; skipped ones do not count)."""

    scale: float
    unscale: float
    lr: float
    at: int


class Figures(NamedTuple):
    """What a step gave: the summed loss, the norm before clipping, whether it was applied."""

    loss: float
    norm: float
    applied: bool
    similarity: float | None = None


@dataclass
class Summed:
    """What forward and backward leave beside the arena's gradient: the summed loss, the similarity loss,
    and of tables updated by rows what is in use, its gradients, and the sum of their squares."""

    loss: float
    similarity: float | None = None
    used: dict[str, InUse] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    square: float = 0.0

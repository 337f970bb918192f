"""AdamW and SGD over flat buffers: torch's fused kernels, each one pass over its part of an arena.

They are called as such (``torch.optim`` would hand them each parameter apart, and the gradient once more
for the clipping), need no compiler, allocate nothing, and give the same bits on any number of threads.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from cllm.core.config import TrainConfig
from cllm.training.arena import Part


class Optimizer(Protocol):
    """An update rule over flat buffers, or over rows of a table.

    What it does to a weight without a gradient has a closed form, so that a row that is not used can be
    left alone and brought up to date when it is used again (``cllm.training.lazy_rows``): each moment
    becomes ``fades[moment]`` times itself, and the weight moves along a ``direction`` that stays what it
    is, by steps of ``drift_rate`` times ``drift_fade`` to the power of the steps since its last gradient,
    beside the decay ``decay``.
    """

    moments: tuple[str, ...]
    decay: float
    fades: dict[str, float]
    drift_fade: float

    def direction(self, moments: dict[str, Tensor]) -> Tensor:
        """Where a weight moves that gets no gradient any more, from its present moments."""

    def drift_rate(self, lr: float, count: int) -> float:
        """How fast in step ``count`` (from 1), without the fading."""

    def update(self, part: Part, grad: Tensor, factor: float, lr: float, count: int) -> None:
        """Make step ``count`` (from 1) at learning rate ``lr`` in place, with ``factor`` times ``grad``,
        which is the gradient of the part and is overwritten."""


class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2)."""

    moments: tuple[str, ...] = ("mean", "square")

    def __init__(self, config: TrainConfig) -> None:
        self.betas, self.eps, self.decay = config.betas, config.eps, config.weight_decay
        self._scalars = _Scalars()
        beta1, beta2 = self.betas
        self.fades = {"mean": beta1, "square": beta2}
        self.drift_fade = beta1 / math.sqrt(beta2) if beta2 else math.inf

    def direction(self, moments: dict[str, Tensor]) -> Tensor:
        """See ``Optimizer``. Exact but for ``eps``, which is taken as if it faded with √square."""
        return moments["mean"] / (moments["square"].sqrt() + self.eps)

    def drift_rate(self, lr: float, count: int) -> float:
        """The rate with both biases corrected."""
        beta1, beta2 = self.betas
        return lr / (1 - beta1**count) * math.sqrt(1 - beta2**count)

    def update(self, part: Part, grad: Tensor, factor: float, lr: float, count: int) -> None:
        """See ``Optimizer``."""
        beta1, beta2 = self.betas
        torch._fused_adamw_(
            [part.weights],
            [grad],
            [part.moments["mean"]],
            [part.moments["square"]],
            [],
            [self._scalars.count(grad, count)],
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=self.decay if part.decays else 0.0,
            eps=self.eps,
            amsgrad=False,
            maximize=False,
            grad_scale=self._scalars.divisor(grad, factor),
        )
        _renew(part)


class SGD:
    """Gradient descent with heavy-ball momentum (Polyak 1964) and decoupled weight decay."""

    moments: tuple[str, ...] = ("velocity",)

    def __init__(self, config: TrainConfig) -> None:
        self.momentum, self.decay = config.momentum, config.weight_decay
        self._scalars = _Scalars()
        self.fades = {"velocity": self.momentum}
        self.drift_fade = self.momentum

    def direction(self, moments: dict[str, Tensor]) -> Tensor:
        """The velocity; exact."""
        return moments["velocity"]

    def drift_rate(self, lr: float, count: int) -> float:
        """The rate itself."""
        return lr

    def update(self, part: Part, grad: Tensor, factor: float, lr: float, count: int) -> None:
        """See ``Optimizer``; torch's own decay would go through the velocity."""
        if part.decays and self.decay:
            part.weights.mul_(self._scalars.kept(part.weights, 1 - lr * self.decay))
        # The kernel refuses a velocity that is not used; it stays zero.
        velocities = [part.moments["velocity"]] if self.momentum else []
        torch._fused_sgd_(
            [part.weights],
            [grad],
            velocities,
            weight_decay=0.0,
            momentum=self.momentum,
            lr=lr,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
            grad_scale=self._scalars.divisor(grad, factor),
        )
        _renew(part)


class _Scalars:
    """The numbers that the kernels take as tensors: one of each on each device, filled anew."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, torch.device], Tensor] = {}

    def count(self, grad: Tensor, count: int) -> Tensor:
        """The step's number, exact to 2^24."""
        return self._filled("count", grad.device, float(count))

    def kept(self, weights: Tensor, share: float) -> Tensor:
        """What a weight keeps under decay (of a plain number torch would make a new tensor each time)."""
        return self._filled("kept", weights.device, share, weights.dtype)

    def divisor(self, grad: Tensor, factor: float) -> Tensor | None:
        """What the kernel divides the gradient by, so as to multiply it with ``factor``; ``None`` where
        that is done here, as the kernel takes nothing finer than float32, or where nothing is to be done.
        """
        if factor == 1.0:
            return None
        if grad.dtype == torch.float64:
            grad.mul_(factor)
            return None
        return self._filled("divisor", grad.device, 1.0 / factor)

    def _filled(
        self, name: str, device: torch.device, value: float, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        key = name, device
        if key not in self._known:
            self._known[key] = torch.zeros((), dtype=dtype, device=device)
        return self._known[key].fill_(value)


def _renew(part: Part) -> None:
    """The copy in the arithmetic's precision."""
    if part.copy is not None:
        part.copy.copy_(part.weights)


OPTIMIZERS: dict[str, type[AdamW | SGD]] = {"adamw": AdamW, "sgd": SGD}

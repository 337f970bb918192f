"""AdamW and SGD over flat buffers, each a few elementwise lines that compile into one pass.

Not compiled they allocate nothing either: the lines are in place, constants are tensors beside the rates (a
plain number becomes a new tensor in each call), and what is between them is in a buffer that is given.
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

    def rates(self, lr: float, count: int) -> tuple[float, ...]:
        """The numbers of step ``count`` (from 1) at learning rate ``lr`` that ``update`` takes."""

    def update(self, part: Part, grad: Tensor, rates: Tensor, work: Tensor) -> None:
        """Change the weights in place.

        ``grad`` is the gradient of the part, ``rates`` a tensor of its factor (clipping) and of what
        ``rates()`` gave, ``work`` a buffer of the gradient's shape that is overwritten.
        """


class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2)."""

    moments: tuple[str, ...] = ("mean", "square")

    def __init__(self, config: TrainConfig) -> None:
        self.betas, self.eps, self.decay = config.betas, config.eps, config.weight_decay
        beta1, beta2 = self.betas
        self.fades = {"mean": beta1, "square": beta2}
        self.drift_fade = beta1 / math.sqrt(beta2) if beta2 else math.inf

    def direction(self, moments: dict[str, Tensor]) -> Tensor:
        """See ``Optimizer``. Exact but for ``eps``, which is taken as if it faded with √square."""
        return moments["mean"] / (moments["square"].sqrt() + self.eps)

    def drift_rate(self, lr: float, count: int) -> float:
        """The rate with both biases corrected."""
        _, corrected_lr, root, *_ = self.rates(lr, count)
        return corrected_lr / root

    def rates(self, lr: float, count: int) -> tuple[float, ...]:
        """What a weight keeps under decay, the rate with the mean's bias corrected, and the factor that
        corrects √square; then the constants."""
        beta1, beta2 = self.betas
        root = (1 - beta2**count) ** -0.5
        changing = (1 - lr * self.decay, lr / (1 - beta1**count), root)
        return (*changing, beta1, beta2, self.eps)

    def update(self, part: Part, grad: Tensor, rates: Tensor, work: Tensor) -> None:
        """See ``Optimizer``; one division and one root an element."""
        factor, kept, step, root, beta1, beta2, eps = rates.unbind()
        mean, square = part.moments["mean"], part.moments["square"]
        torch.mul(grad, factor, out=work)
        mean.mul_(beta1).add_(work, alpha=1 - self.betas[0])
        square.mul_(beta2).addcmul_(work, work, value=1 - self.betas[1])
        torch.sqrt(square, out=work)
        torch.div(mean, work.mul_(root).add_(eps), out=work)
        if part.decays:
            part.weights.mul_(kept)
        part.weights.sub_(work.mul_(step))
        _renew(part)


class SGD:
    """Gradient descent with heavy-ball momentum (Polyak 1964) and decoupled weight decay."""

    moments: tuple[str, ...] = ("velocity",)

    def __init__(self, config: TrainConfig) -> None:
        self.momentum, self.decay = config.momentum, config.weight_decay
        self.fades = {"velocity": self.momentum}
        self.drift_fade = self.momentum

    def direction(self, moments: dict[str, Tensor]) -> Tensor:
        """The velocity; exact."""
        return moments["velocity"]

    def drift_rate(self, lr: float, count: int) -> float:
        """The rate itself."""
        return lr

    def rates(self, lr: float, count: int) -> tuple[float, ...]:
        """What a weight keeps under decay, the rate, and the momentum."""
        return 1 - lr * self.decay, lr, self.momentum

    def update(self, part: Part, grad: Tensor, rates: Tensor, work: Tensor) -> None:
        """See ``Optimizer``."""
        factor, kept, step, momentum = rates.unbind()
        velocity = part.moments["velocity"]
        torch.mul(grad, factor, out=work)
        velocity.mul_(momentum).add_(work)
        if part.decays:
            part.weights.mul_(kept)
        torch.mul(velocity, step, out=work)
        part.weights.sub_(work)
        _renew(part)


def _renew(part: Part) -> None:
    """The copy in the arithmetic's precision, while the weights are in the cache."""
    if part.copy is not None:
        part.copy.copy_(part.weights)


OPTIMIZERS: dict[str, type[AdamW | SGD]] = {"adamw": AdamW, "sgd": SGD}

"""AdamW and SGD over flat buffers, each a few elementwise lines that compile into one pass.

A step that must be skipped is applied with ``apply`` = 0: weights and moments then keep their bits.
"""

from __future__ import annotations

import math
from typing import Protocol

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

    def update(self, part: Part, grad: Tensor, rates: Tensor, apply: Tensor) -> None:
        """Change the weights in place.

        ``grad`` is the flat gradient (zeros where the step is skipped), ``rates`` a tensor of what
        ``rates()`` gave, ``apply`` a scalar tensor, 1.0, or 0.0 to skip.
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
        _, corrected_lr, root = self.rates(lr, count)
        return corrected_lr / root

    def rates(self, lr: float, count: int) -> tuple[float, ...]:
        """The rate, the rate with the mean's bias corrected, and the factor that corrects √square."""
        beta1, beta2 = self.betas
        return lr, lr / (1 - beta1**count), (1 - beta2**count) ** -0.5

    def update(self, part: Part, grad: Tensor, rates: Tensor, apply: Tensor) -> None:
        """See ``Optimizer``; one division and one root an element."""
        beta1, beta2 = self.betas
        lr, corrected_lr, root = rates.unbind()
        mean, square = part.moments["mean"], part.moments["square"]
        mean.add_((grad - mean) * (apply * (1 - beta1)))
        square.add_((grad * grad - square) * (apply * (1 - beta2)))
        step = mean / (square.sqrt() * root + self.eps) * corrected_lr
        decay = part.decay * part.weights * (lr * self.decay)
        part.weights.sub_((step + decay) * apply)


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
        """The rate alone."""
        return (lr,)

    def update(self, part: Part, grad: Tensor, rates: Tensor, apply: Tensor) -> None:
        """See ``Optimizer``."""
        velocity = part.moments["velocity"]
        velocity.add_((velocity * (self.momentum - 1) + grad) * apply)
        decay = part.decay * part.weights * self.decay
        part.weights.sub_((velocity + decay) * (rates[0] * apply))


OPTIMIZERS: dict[str, type[AdamW | SGD]] = {"adamw": AdamW, "sgd": SGD}

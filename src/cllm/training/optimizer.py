"""AdamW and SGD over flat buffers, each a few elementwise lines that compile into one pass.

A step that must be skipped is applied with ``apply`` = 0: weights and moments then keep their bits.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from cllm.core.config import TrainConfig
from cllm.training.arena import Arena


class Optimizer(Protocol):
    """An update rule over an arena."""

    moments: tuple[str, ...]

    def rates(self, lr: float, count: int) -> tuple[float, ...]:
        """The numbers of step ``count`` (from 1) at learning rate ``lr`` that ``update`` takes."""

    def update(self, arena: Arena, grad: Tensor, rates: Tensor, apply: Tensor) -> None:
        """Change the weights in place.

        ``grad`` is the flat gradient (zeros where the step is skipped), ``rates`` a tensor of what
        ``rates()`` gave, ``apply`` a scalar tensor, 1.0, or 0.0 to skip.
        """


class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2)."""

    moments = ("mean", "square")

    def __init__(self, config: TrainConfig) -> None:
        self.betas, self.eps, self.decay = config.betas, config.eps, config.weight_decay

    def rates(self, lr: float, count: int) -> tuple[float, ...]:
        """The rate, the rate with the mean's bias corrected, and the factor that corrects √square."""
        beta1, beta2 = self.betas
        return lr, lr / (1 - beta1**count), (1 - beta2**count) ** -0.5

    def update(self, arena: Arena, grad: Tensor, rates: Tensor, apply: Tensor) -> None:
        """See ``Optimizer``; one division and one root an element."""
        beta1, beta2 = self.betas
        lr, corrected_lr, root = rates.unbind()
        mean, square = arena.moments["mean"], arena.moments["square"]
        mean.add_((grad - mean) * (apply * (1 - beta1)))
        square.add_((grad * grad - square) * (apply * (1 - beta2)))
        step = mean / (square.sqrt() * root + self.eps) * corrected_lr
        decay = arena.decay * arena.weights * (lr * self.decay)
        arena.weights.sub_((step + decay) * apply)


class SGD:
    """Gradient descent with heavy-ball momentum (Polyak 1964) and decoupled weight decay."""

    moments = ("velocity",)

    def __init__(self, config: TrainConfig) -> None:
        self.momentum, self.decay = config.momentum, config.weight_decay

    def rates(self, lr: float, count: int) -> tuple[float, ...]:
        """The rate alone."""
        return (lr,)

    def update(self, arena: Arena, grad: Tensor, rates: Tensor, apply: Tensor) -> None:
        """See ``Optimizer``."""
        velocity = arena.moments["velocity"]
        velocity.add_((velocity * (self.momentum - 1) + grad) * apply)
        decay = arena.decay * arena.weights * self.decay
        arena.weights.sub_((velocity + decay) * (rates[0] * apply))


OPTIMIZERS: dict[str, type[AdamW | SGD]] = {"adamw": AdamW, "sgd": SGD}

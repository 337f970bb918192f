"""AdamW and SGD over flat buffers, each a few elementwise lines that compile into one pass.

A step that must be skipped is applied with ``apply`` = 0: weights and moments then keep their bits.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from cllm.core.config import TrainConfig
from cllm.training.arena import Arena


class Optimizer(Protocol):
    """An update rule over an arena."""

    moments: tuple[str, ...]

    def update(self, arena: Arena, grad: Tensor, lr: Tensor, count: Tensor, apply: Tensor) -> None:
        """Change the weights in place.

        ``grad`` is the flat gradient (zeros where the step is skipped), ``lr`` the rate of this step,
        ``count`` the number of steps applied with this one, ``apply`` 1.0, or 0.0 to skip; the last
        three are scalar tensors.
        """


class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2)."""

    moments = ("mean", "square")

    def __init__(self, config: TrainConfig) -> None:
        self.betas, self.eps, self.decay = config.betas, config.eps, config.weight_decay

    def update(self, arena: Arena, grad: Tensor, lr: Tensor, count: Tensor, apply: Tensor) -> None:
        """See ``Optimizer``; ``lr`` times ``weight_decay`` is taken off before the step."""
        beta1, beta2 = self.betas
        mean, square = arena.moments["mean"], arena.moments["square"]
        mean.add_((grad - mean) * (apply * (1 - beta1)))
        square.add_((grad * grad - square) * (apply * (1 - beta2)))
        correction1 = 1 - torch.pow(beta1, count.clamp_min(1.0))
        correction2 = 1 - torch.pow(beta2, count.clamp_min(1.0))
        step = (mean / correction1) / ((square / correction2).sqrt() + self.eps)
        rate = lr * apply
        arena.weights.sub_(rate * (step + self.decay * arena.decay * arena.weights))


class SGD:
    """Gradient descent with heavy-ball momentum (Polyak 1964) and decoupled weight decay."""

    moments = ("velocity",)

    def __init__(self, config: TrainConfig) -> None:
        self.momentum, self.decay = config.momentum, config.weight_decay

    def update(self, arena: Arena, grad: Tensor, lr: Tensor, count: Tensor, apply: Tensor) -> None:
        """See ``Optimizer``."""
        velocity = arena.moments["velocity"]
        velocity.add_((velocity * (self.momentum - 1) + grad) * apply)
        rate = lr * apply
        arena.weights.sub_(rate * (velocity + self.decay * arena.decay * arena.weights))


OPTIMIZERS: dict[str, type[AdamW | SGD]] = {"adamw": AdamW, "sgd": SGD}

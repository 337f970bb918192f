"""What an optimizer would have done to a weight while it got no gradient, in closed form.

With a gradient of zero, AdamW and SGD multiply each moment by a constant, shrink the weight by
1 − lr · decay, and move it along a direction that stays what it is, by steps that fade geometrically. Over
steps τ+1, …, t this is

    w_t = w_τ · Π_i (1 − lr_i · decay)
          − direction · Σ_i drift_rate_i · fade^(i−τ) · Π_{j>i} (1 − lr_j · decay),

in which product and sum depend on nothing but τ. They are kept for every τ and moved on by a step at a
time, so that a row that was idle for any number of steps is brought up to date by one line.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cllm.training.optimizer import Optimizer

_NOTHING = 1e-30
"""A fading drift below this share of what it was is over."""


class IdleClock:
    """Counts applied steps, and knows what each missed since any of them.

    ``count``: steps so far; ``decay`` and ``drift`` (count + 1,) float64: the product and the sum above,
    by τ.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        fade = optimizer.drift_fade
        self._horizon = math.ceil(math.log(_NOTHING) / math.log(fade)) if 0 < fade < 1 else 1
        self.restart(0)

    def restart(self, count: int) -> None:
        """Stand at ``count`` steps, with nothing missed since any of them."""
        self.count = count
        self.decay, self.drift = np.ones(count + 1), np.zeros(count + 1)

    def advance(self, lr: float) -> None:
        """One more step was applied, at learning rate ``lr``."""
        assert self.optimizer.drift_fade < 1, "checked with the configuration"
        self.count += 1
        shrunk = 1.0 - lr * self.optimizer.decay
        self.decay, self.drift = self.decay * shrunk, self.drift * shrunk
        ages = np.arange(min(self.count, self._horizon), 0, -1)
        rate = self.optimizer.drift_rate(lr, self.count)
        self.drift[-len(ages) :] += rate * self.optimizer.drift_fade ** ages.astype(np.float64)
        self.decay, self.drift = np.append(self.decay, 1.0), np.append(self.drift, 0.0)

    def catch_up(
        self, weights_nr: Tensor, moments_nr: dict[str, Tensor], touched_n: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Rows and moments as they would be now: copies of those last brought up to date at ``touched_n``.

        Rows that missed nothing keep their bits.
        """
        since = touched_n.cpu().numpy()

        def column(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values).to(weights_nr.device, weights_nr.dtype)[:, None]

        idle = (self.count - since).astype(np.float64)
        decay, drift = column(self.decay[since]), column(self.drift[since])
        weights = weights_nr * decay - self.optimizer.direction(moments_nr) * drift
        faded = {
            name: moment * column(self.optimizer.fades[name] ** idle)
            for name, moment in moments_nr.items()
        }
        return weights, faded

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        arrays = {"decay": self.decay, "drift": self.drift}
        return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of ``state``."""
        self.decay, self.drift = state["decay"].numpy().copy(), state["drift"].numpy().copy()
        self.count = len(self.decay) - 1

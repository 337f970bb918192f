"""The optimizer in the backward pass: a tensor is updated as soon as its gradient is known.

Where nothing needs the norm of the whole gradient (there is no clipping), the update of a layer does not
wait for the layers below it, and finds its gradient in the cache. What is given up is that a step can be
skipped whole: a loss that is not finite is seen before anything is changed, a gradient that is not only
when the layers above have been updated, which ends the training. The bits are those of an update at the
end (Lv et al., "Full parameter fine-tuning for large language models with limited resources", 2023, fuse
the two likewise, to save the memory of the gradient; the arena keeps it). Each check of a gradient waits
for the device (not measured on a GPU).
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from cllm.core.errors import UserError
from cllm.training.arena import Arena, Part
from cllm.training.figures import Figures, Numbers
from cllm.training.gradient import Gradients, Micro
from cllm.training.optimizer import Optimizer


class InBackward:
    """Makes the whole step of one micro-batch."""

    def __init__(self, arena: Arena, gradients: Gradients, optimizer: Optimizer) -> None:
        self.gradients, self.optimizer = gradients, optimizer
        self._grads = arena.dense_layout.views(arena.grad)
        self._flat = arena.grad
        self._parts = _parts_of(arena)
        self._scale = arena.weights.new_zeros(())
        self._left: set[str] = set()
        self._square = 0.0
        self._numbers = Numbers(1.0, 1.0, 0.0, 1)
        self._is_finite = False

    def step(self, micro: Micro, numbers: Numbers) -> Figures:
        """Forward, and backward with the update. Nothing changes where the loss is not finite; raises
        ``UserError`` where a gradient is not: the weights are then of no use."""
        self._numbers, self._square, self._left = numbers, 0.0, set(self._parts)
        self._scale.fill_(numbers.scale)
        loss, similarity, named, _ = self.gradients.by_name(micro, self._scale, {}, self)
        for name in sorted(self._left):
            self.known(name, named[name])
        alike = None if similarity is None else float(similarity)
        return Figures(float(loss), math.sqrt(self._square), self._is_finite, alike)

    def begin(self, loss: Tensor) -> None:
        """See ``Listener``."""
        self._is_finite = math.isfinite(float(loss))

    def known(self, name: str, grad: Tensor) -> None:
        """See ``Listener``: update the parameter."""
        self._left.discard(name)
        place = self._grads[name].copy_(grad)
        square = float(torch.linalg.vector_norm(place)) ** 2
        self._square += square
        if not self._is_finite:
            return
        if not math.isfinite(square):
            raise UserError(
                f"the gradient of {name} is not finite, and train.optimizer_in_backward has updated other "
                "weights already: resume from the last checkpoint with it set to false and a lower train.lr"
            )
        part, numbers = self._parts[name], self._numbers
        self.optimizer.update(part, part.of(self._flat), 1.0, numbers.lr, numbers.at)


def _parts_of(arena: Arena) -> dict[str, Part]:
    """Each tensor with its padding, so that no vector of the kernel ends within it.

    They are not views as autograd knows them (``data``): it would take any update for one of all that it
    keeps for the backward pass, since all lie in one buffer. What is updated is read no more there.
    """
    layout = arena.dense_layout
    ends = [0]
    for size in layout.padded:
        ends.append(ends[-1] + size)
    copy = arena.compute if arena.compute is not arena.weights else None
    return {
        name: Part(
            weights=arena.weights[first:last].data,
            moments={moment: flat[first:last] for moment, flat in arena.moments.items()},
            decays=first < arena.decaying,
            copy=copy[first:last].data if copy is not None else None,
            first=first,
        )
        for name, (first, last) in zip(layout.names, pairwise(ends), strict=True)
    }

"""A micro-batch's gradient in two halves that different threads can run: forward, then backward.

The same mathematics as ``cllm.training.gradient``, which is one graph. Here autograd holds what the
backward needs between them: compiled, AOTAutograd's two graphs and their saved activations. What is saved
of the weights are views of the buffer that the forward read, which must therefore stay as it is until the
backward is done. The head's loss and gradient are one computation, and belong to the forward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from cllm.model.cross_entropy import linear_cross_entropy
from cllm.model.embedding import add_rows
from cllm.model.norms import Statistics, wide
from cllm.training.compiled import perhaps_compiled
from cllm.training.gradient import INPUT, Gradients, Micro


@dataclass
class Held:
    """What is kept of a micro-batch from its forward to its backward; ``loss`` is summed, in nats."""

    ids: Tensor
    weights: Tensor
    coordinates: Tensor
    hidden: Tensor
    hidden_grad: Tensor
    scoring_grad: Tensor
    loss: Tensor


class Halves:
    """Forward and backward over given weights, on the exact loss; no core may be computed."""

    def __init__(self, gradients: Gradients, *, compiled: bool) -> None:
        assert not gradients.cores, "refused with the configuration"
        self.gradients = gradients
        self.layout, self.output = gradients.layout, gradients.output
        self._trunk = perhaps_compiled(self._run_trunk, compiled)
        self._head = perhaps_compiled(self._run_head, compiled)
        self._write = perhaps_compiled(self._write_gradient, compiled)

    def forward(self, weights: Tensor, micro: Micro, scale: Tensor) -> Held:
        """The loss of a micro-batch on flat ``weights``, and what the backward needs of it."""
        with torch.enable_grad():
            leaf = weights.detach().requires_grad_()
            table = self._table(weights, INPUT)
            coordinates = functional.embedding(micro.ids, table).requires_grad_()
            hidden = self._trunk(leaf, coordinates)
        with torch.no_grad():
            loss, hidden_grad, scoring_grad = self._head(
                hidden.detach(), weights, micro.targets, scale
            )
        return Held(micro.ids, leaf, coordinates, hidden, hidden_grad, scoring_grad, loss)

    def backward(self, held: Held, grad: Tensor, *, first: bool) -> None:
        """Put the gradient into the flat ``grad``, or add it to what is there."""
        flat, coordinates_grad = torch.autograd.grad(
            held.hidden, (held.weights, held.coordinates), held.hidden_grad
        )
        with torch.no_grad():
            if not first:
                whole, grad = grad, torch.empty_like(grad)
            self._write(flat, coordinates_grad, held.ids, held.scoring_grad, grad)
            if not first:
                whole.add_(grad)

    def _run_trunk(self, weights: Tensor, coordinates: Tensor) -> Tensor:
        views = self.layout.views(weights)
        parameters = {f"model.{name}": view for name, view in views.items()}
        statistics: Statistics = []  # of batch norm, which is refused
        arguments = (coordinates, statistics)
        hidden: Tensor = torch.func.functional_call(self.gradients.trunk, parameters, arguments)
        return hidden.flatten(0, 1)

    def _run_head(
        self, hidden: Tensor, weights: Tensor, targets: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        scoring = self._table(weights, self.output)
        chunk = self.gradients.chunk
        return linear_cross_entropy(hidden, scoring, targets.flatten(), scale, chunk)

    def _write_gradient(
        self,
        flat: Tensor,
        coordinates_grad: Tensor,
        ids: Tensor,
        scoring_grad: Tensor,
        grad: Tensor,
    ) -> None:
        rows = len(self._table(flat, INPUT))
        looked_up = add_rows(wide(coordinates_grad.flatten(0, 1)), ids.flatten(), rows)
        tables = {self.output: scoring_grad}
        tables[INPUT] = looked_up + scoring_grad if self.output == INPUT else looked_up
        grad.copy_(flat)
        for name, found in tables.items():
            self._table(grad, name).copy_(found)

    def _table(self, flat: Tensor, name: str) -> Tensor:
        return self.layout.views(flat)[f"{name}.weight"]

"""One training step as one function: forward, backward, clipping, optimizer and the cast of the weights.

Everything is functional over the arena's flat buffers, so that ``torch.compile`` sees a single graph
with no autograd boundary in it: gradients go from the backward's products straight into the flat
buffer, and one pass updates moments, weights and their low-precision copy.

A step whose loss or gradient is not finite changes nothing but its counters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from cllm.core.config import TrainConfig
from cllm.model.cross_entropy import IGNORE, cross_entropy_sum, linear_cross_entropy
from cllm.model.embedding import add_rows
from cllm.model.norms import BatchNorm, Statistics, wide
from cllm.model.transformer import Transformer
from cllm.training.arena import Arena
from cllm.training.optimizer import OPTIMIZERS

INPUT = "model.embedding.weight"
LOSS_SCALE_START = 2.0**14
LOSS_SCALE_PATIENCE = 500
"""Steps without overflow after which fp16's loss scale is doubled."""


class _Trunk(nn.Module):
    """The model between its two tables, for ``functional_call``."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, vectors_btd: Tensor, statistics: Statistics) -> Tensor:
        return self.model.trunk(vectors_btd, statistics=statistics)


@dataclass(frozen=True)
class StepResult:
    """What a step reports: mean loss in nats per target token, gradient norm before clipping, whether
    the step was applied."""

    loss: float
    grad_norm: float
    applied: bool


F = TypeVar("F", bound=Callable[..., Any])


def _perhaps_compiled(function: F, compiled: bool) -> F:
    return cast(F, torch.compile(function, dynamic=False)) if compiled else function


class TrainStep:
    """The compiled (or eager) step over one model and its arena.

    ``counters`` holds, as scalar tensors: ``applied`` steps, ``skipped`` steps, ``in_row`` skipped ones
    since the last applied, and for fp16 the ``loss_scale`` and the ``calm`` steps since it changed.
    """

    def __init__(
        self,
        model: Transformer,
        arena: Arena,
        config: TrainConfig,
        *,
        chunk: int = 0,
        compiled: bool = False,
    ) -> None:
        self.model, self.arena, self.config, self.chunk = model, arena, config, chunk
        self.optimizer = OPTIMIZERS[config.optimizer](config)
        self.scaling = arena.compute.dtype == torch.float16
        names = ("applied", "skipped", "in_row", "loss_scale", "calm")
        self.counters = {name: arena.weights.new_zeros(()) for name in names}
        self.counters["loss_scale"].fill_(LOSS_SCALE_START if self.scaling else 1.0)
        self._trunk = _Trunk(model)
        self._output = f"model.{model.output_name}"
        self._norms = {m.name: m for m in model.modules() if isinstance(m, BatchNorm)}
        self._whole = _perhaps_compiled(self._whole_step, compiled)
        self._part = _perhaps_compiled(self._accumulate, compiled)
        self._end = _perhaps_compiled(self._finish, compiled)
        self._loss = _perhaps_compiled(self._summed_loss, compiled)

    def __call__(self, batches: Sequence[tuple[Tensor, Tensor]], lr: float) -> StepResult:
        """Train on micro-batches of (ids, targets), each (B, T) int64 on the model's device."""
        targets = sum(int((y != IGNORE).sum()) for _, y in batches)
        rate = torch.tensor(lr, dtype=self.arena.weights.dtype)
        share = torch.tensor(1.0 / max(targets, 1), dtype=self.arena.weights.dtype)
        rate, share = rate.to(self.arena.weights.device), share.to(self.arena.weights.device)
        if len(batches) == 1:
            loss, norm, applied = self._whole(*batches[0], rate, share)
        else:
            self.arena.grad.zero_()
            total = torch.zeros_like(share)
            for ids, y in batches:
                total += self._part(ids, y, share)
            loss, norm, applied = self._end(self.arena.grad, total, rate)
        figures = torch.stack([loss * share, norm, applied]).tolist()
        return StepResult(loss=figures[0], grad_norm=figures[1], applied=bool(figures[2]))

    def gradient(self, batches: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Mean loss and its flat gradient over micro-batches, without a step."""
        share = wide(
            self.arena.weights.new_tensor(1.0 / sum(int((y != IGNORE).sum()) for _, y in batches))
        )
        total, flat = torch.zeros_like(share), torch.zeros_like(self.arena.weights)
        for ids, y in batches:
            loss, grad = self._backward(ids, y, share * self.counters["loss_scale"])
            total, flat = total + loss, flat + grad
        return total * share, flat / self.counters["loss_scale"]

    def evaluate(self, ids_bt: Tensor, targets_bt: Tensor) -> Tensor:
        """Summed loss in nats of one batch; the model's own mode (train or eval) holds."""
        with torch.no_grad():
            return self._loss(ids_bt, targets_bt)

    def _parameters(self) -> dict[str, Tensor]:
        views = self.arena.layout.views(self.arena.compute)
        return {f"model.{name}": view for name, view in views.items()}

    def _summed_loss(self, ids_bt: Tensor, targets_bt: Tensor) -> Tensor:
        parameters = self._parameters()
        vectors = functional.embedding(ids_bt, parameters[INPUT])
        hidden = torch.func.functional_call(self._trunk, parameters, (vectors, []))
        table = parameters[self._output]
        return cross_entropy_sum(hidden.flatten(0, 1), table, targets_bt.flatten(), self.chunk)

    def _backward(self, ids_bt: Tensor, targets_bt: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Summed loss, and the flat gradient of ``scale`` times it."""

        def trunk(parameters: dict[str, Tensor], vectors: Tensor) -> tuple[Tensor, Statistics]:
            statistics: Statistics = []
            hidden = torch.func.functional_call(self._trunk, parameters, (vectors, statistics))
            return hidden.flatten(0, 1), statistics

        parameters = self._parameters()
        vectors = functional.embedding(ids_bt, parameters[INPUT])
        hidden, pull, statistics = torch.func.vjp(  # type: ignore[misc]
            trunk, parameters, vectors, has_aux=True
        )
        loss, hidden_grad, table_grad = linear_cross_entropy(
            hidden, parameters[self._output], targets_bt.flatten(), scale, self.chunk
        )
        # The tables' gradients are added here rather than by autograd, each in a fixed order.
        grads, vectors_grad = pull(hidden_grad)
        looked_up = add_rows(
            wide(vectors_grad.flatten(0, 1)), ids_bt.flatten(), parameters[INPUT].shape[0]
        )
        grads[self._output] = table_grad
        grads[INPUT] = looked_up + table_grad if self._output == INPUT else looked_up
        self._observe(statistics)
        named = {name.removeprefix("model."): grad for name, grad in grads.items()}
        return loss, self.arena.layout.flatten(named, self.arena.weights.dtype)

    def _observe(self, statistics: Statistics) -> None:
        """Move batch norm's running averages towards what this batch showed."""
        for name, value in statistics:
            module, _, buffer = name.rpartition(".")
            running = getattr(self._norms[module], buffer)
            running.add_((value - running) * BatchNorm.momentum)

    def _accumulate(self, ids_bt: Tensor, targets_bt: Tensor, share: Tensor) -> Tensor:
        loss, grad = self._backward(ids_bt, targets_bt, share * self.counters["loss_scale"])
        self.arena.grad.add_(grad)
        return loss

    def _whole_step(
        self, ids_bt: Tensor, targets_bt: Tensor, lr: Tensor, share: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss, grad = self._backward(ids_bt, targets_bt, share * self.counters["loss_scale"])
        return self._finish(grad, loss, lr)

    def _finish(self, grad: Tensor, loss: Tensor, lr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Check, clip, update, count; returns loss, norm before clipping, and 1.0 if applied."""
        arena, counters = self.arena, self.counters
        norm = torch.linalg.vector_norm(grad) / counters["loss_scale"]
        finite = torch.isfinite(norm) & torch.isfinite(loss)
        apply = finite.to(grad.dtype)
        factor = 1.0 / counters["loss_scale"]
        if self.config.clip > 0:
            factor = factor * (self.config.clip / (norm + 1e-6)).clamp_max(1.0)
        counters["applied"].add_(apply)
        counters["skipped"].add_(1 - apply)
        counters["in_row"].copy_((counters["in_row"] + 1) * (1 - apply))
        grad = torch.where(finite, grad * factor, 0.0)
        self.optimizer.update(arena, grad, lr, counters["applied"], apply)
        if arena.compute is not arena.weights:
            arena.compute.copy_(arena.weights)
        if self.scaling:
            self._adjust_loss_scale(finite)
        return loss, norm, apply

    def _adjust_loss_scale(self, finite: Tensor) -> None:
        """Halve fp16's loss scale on overflow, double it after many calm steps (Micikevicius 2018)."""
        scale, calm = self.counters["loss_scale"], self.counters["calm"]
        calm.copy_((calm + 1) * finite)
        grow = calm >= LOSS_SCALE_PATIENCE
        scale.copy_(torch.where(finite, torch.where(grow, scale * 2, scale), scale * 0.5))
        calm.copy_(torch.where(grow, 0.0, calm))

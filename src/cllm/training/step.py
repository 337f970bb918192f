"""One training step as one function: forward, backward, clipping, optimizer and the cast of the weights.

Everything is functional over the arena's flat buffers, so that ``torch.compile`` sees a single graph
with no autograd boundary in it: gradients go from the backward's products straight into the flat
buffer, and one pass updates moments, weights and their low-precision copy.

A step whose loss or gradient is not finite changes nothing but its counters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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

INPUT = "embedding"
LOSS_SCALE_START = 2.0**14
LOSS_SCALE_PATIENCE = 500
"""Steps without overflow after which fp16's loss scale is doubled."""


class _Trunk(nn.Module):
    """The model between the cores of its two tables, for ``functional_call``."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, coordinates_btr: Tensor, statistics: Statistics) -> Tensor:
        vectors_btd = self.model.embedding.expand(coordinates_btr)
        return self.model.output.contract(self.model.trunk(vectors_btd, statistics=statistics))


@torch.library.custom_op("cllm::clip_factor", mutates_args=())
def clip_factor(norm: Tensor, loss: Tensor, unscale: Tensor, clip: float) -> Tensor:
    """(2,): the factor for the gradient (``unscale``, and clipping at ``clip`` if that is above 0), and
    1.0 if norm and loss are finite, else 0.0.

    An operator of its own, so that Inductor computes it once and not again for each element of the
    update that it is fused into; four divisions an element were a third of a small model's step.
    """
    if norm.device.type == "cpu":  # plain numbers are quicker than six tiny operations
        size, usable = float(norm), math.isfinite(norm) and math.isfinite(loss)
        share = min(clip / (size + 1e-6), 1.0) if clip > 0 else 1.0
        return torch.tensor([float(unscale) * share, float(usable)], dtype=norm.dtype)
    factor = unscale * (clip / (norm + 1e-6)).clamp_max(1.0) if clip > 0 else unscale
    finite = torch.isfinite(norm) & torch.isfinite(loss)
    return torch.stack([factor, finite.to(factor.dtype)])


@clip_factor.register_fake
def _(norm: Tensor, loss: Tensor, unscale: Tensor, clip: float) -> Tensor:
    return norm.new_empty(2)


@dataclass(frozen=True)
class StepResult:
    """What a step reports: mean loss in nats per target token, gradient norm before clipping, whether
    the step was applied."""

    loss: float
    grad_norm: float
    applied: bool


F = TypeVar("F", bound=Callable[..., Any])


def _perhaps_compiled(function: F, compiled: bool) -> F:
    """``function``, compiled for the shapes it is called with.

    Dynamo checks before each call that nothing the code was compiled for has changed; over a model's
    many attributes this takes a third of a millisecond. Here nothing can change but tensors: each step
    has compiled code of its own, and each function is called in one mode of the model only.
    """
    if not compiled:
        return function
    options = {"guard_filter_fn": torch.compiler.keep_tensor_guards_unsafe}
    found = torch.compile(  # type: ignore[call-overload]
        function, dynamic=False, fullgraph=True, isolate_recompiles=True, options=options
    )
    return cast(F, found)


class TrainStep:
    """The compiled (or eager) step over one model and its arena.

    ``counters`` holds, as scalar tensors on the CPU: ``applied`` steps, ``skipped`` steps, ``in_row``
    skipped ones since the last applied, and for fp16 the ``loss_scale`` and the ``calm`` steps since it
    changed. ``cores`` holds, by table, the cores that are computed rather than learned; ``core_uses``
    counts how often they were ``computed`` and ``read``.
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
        self.counters = {name: torch.zeros(()) for name in names}
        self.counters["loss_scale"].fill_(LOSS_SCALE_START if self.scaling else 1.0)
        self._trunk = _Trunk(model)
        self._tables, self._output = model.tables, model.output_name
        self.cores = {
            name: table.core().detach().to(arena.compute.dtype, copy=True)
            for name, table in self._tables.items()
            if table.computes_core
        }
        self.core_uses = {"computed": len(self.cores), "read": 0}
        self._norms = {m.name: m for m in model.modules() if isinstance(m, BatchNorm)}
        self._running = [buffer for norm in self._norms.values() for buffer in norm.buffers()]
        self._whole = _perhaps_compiled(self._whole_step, compiled)
        self._part = _perhaps_compiled(self._accumulate, compiled)
        self._end = _perhaps_compiled(self._finish, compiled)
        self._loss = _perhaps_compiled(self._summed_loss, compiled)

    def __call__(self, batches: Sequence[tuple[Tensor, Tensor]], lr: float) -> StepResult:
        """Train on micro-batches of (ids, targets), each (B, T) int64 on the model's device."""
        targets = sum(int((y != IGNORE).sum()) for _, y in batches)
        numbers = self._numbers(1.0 / max(targets, 1), lr)
        if len(batches) == 1:
            loss, norm, applied = self._whole(*batches[0], numbers)
        else:
            before = self._averages()
            self.arena.grad.zero_()
            total = numbers.new_zeros(())
            for ids, y in batches:
                total += self._part(ids, y, numbers)
            loss, norm, applied = self._end(self.arena.grad, total, numbers, before)
        self._weights_changed(len(batches))
        figures = torch.stack([loss, norm, applied]).tolist()
        self._count(bool(figures[2]))
        return StepResult(
            loss=figures[0] / max(targets, 1), grad_norm=figures[1], applied=bool(figures[2])
        )

    def refresh(self) -> None:
        """Make everything that follows from the weights theirs again, after a change from outside."""
        self.arena.refresh()
        for table in self._tables.values():
            if table.incidence is not None:
                table.incidence.transpose()
        self._compute_cores()
        self._weights_changed(0)

    def _compute_cores(self) -> None:
        """Pieces summed and coordinates snapped, once for all that an optimizer step reads of them."""
        masters = self.arena.layout.views(self.arena.weights)
        for name, kept in self.cores.items():
            made = self._tables[name].core_of(*_factors(masters, name))
            kept.copy_(made)

    def _weights_changed(self, batches: int) -> None:
        for table in self._tables.values():
            table.after_step()
        self.core_uses["computed"] += len(self.cores)
        # Each micro-batch looks its tokens up in the input's core and scores them with the output's.
        self.core_uses["read"] += 2 * batches if self.cores else 0

    def _core(self, name: str, parameters: Mapping[str, Tensor]) -> Tensor:
        """The core (V, r) of a table, in the arithmetic's precision."""
        return self.cores[name] if name in self.cores else parameters[f"model.{name}.weight"]

    def _numbers(self, share: float, lr: float) -> Tensor:
        """What changes from step to step, computed once here rather than for each element there:
        the loss's scale, its inverse, and the optimizer's rates."""
        scale = float(self.counters["loss_scale"])
        rates = self.optimizer.rates(lr, int(self.counters["applied"]) + 1)
        weights = self.arena.weights
        return torch.tensor([share * scale, 1.0 / scale, *rates], dtype=weights.dtype).to(
            weights.device
        )

    def _count(self, applied: bool) -> None:
        """Count a step; halve fp16's loss scale on overflow, double it after many calm steps
        (Micikevicius et al. 2018)."""
        counters = self.counters
        counters["applied"].add_(float(applied))
        counters["skipped"].add_(float(not applied))
        counters["in_row"].add_(1.0).mul_(float(not applied))
        if not self.scaling:
            return
        counters["calm"].add_(1.0).mul_(float(applied))
        if not applied:
            counters["loss_scale"].mul_(0.5)
        elif counters["calm"] >= LOSS_SCALE_PATIENCE:
            counters["loss_scale"].mul_(2)
            counters["calm"].zero_()

    def gradient(self, batches: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Mean loss and its flat gradient over micro-batches, without a step."""
        share = 1.0 / sum(int((y != IGNORE).sum()) for _, y in batches)
        numbers = self._numbers(share, 0.0)
        total, flat = numbers.new_zeros(()), torch.zeros_like(self.arena.weights)
        for ids, y in batches:
            loss, grad = self._backward(ids, y, numbers[0])
            total, flat = total + loss, flat + grad
        return total * share, flat * numbers[1]

    def evaluate(self, ids_bt: Tensor, targets_bt: Tensor) -> Tensor:
        """Summed loss in nats of one batch; the model must be in eval mode, as it was compiled for."""
        assert not self.model.training
        with torch.no_grad():
            return self._loss(ids_bt, targets_bt)

    def evaluate_eagerly(self, ids_bt: Tensor, targets_bt: Tensor) -> Tensor:
        """The same without compiled code, in whatever mode the model's parts are."""
        with torch.no_grad():
            return self._summed_loss(ids_bt, targets_bt)

    def _parameters(self) -> dict[str, Tensor]:
        views = self.arena.layout.views(self.arena.compute)
        return {f"model.{name}": view for name, view in views.items()}

    def _summed_loss(self, ids_bt: Tensor, targets_bt: Tensor) -> Tensor:
        parameters = self._parameters()
        coordinates = functional.embedding(ids_bt, self._core(INPUT, parameters))
        hidden = torch.func.functional_call(self._trunk, parameters, (coordinates, []))
        core = self._core(self._output, parameters)
        return cross_entropy_sum(hidden.flatten(0, 1), core, targets_bt.flatten(), self.chunk)

    def _backward(self, ids_bt: Tensor, targets_bt: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Summed loss, and the flat gradient of ``scale`` times it."""

        def trunk(
            parameters: dict[str, Tensor], coordinates: Tensor
        ) -> tuple[Tensor, dict[str, Tensor]]:
            statistics: Statistics = []
            hidden = torch.func.functional_call(self._trunk, parameters, (coordinates, statistics))
            return hidden.flatten(0, 1), dict(statistics)  # vjp takes names as keys only

        parameters = self._parameters()
        core = self._core(INPUT, parameters)
        coordinates = functional.embedding(ids_bt, core)
        hidden, pull, statistics = torch.func.vjp(  # type: ignore[misc]
            trunk, parameters, coordinates, has_aux=True
        )
        scoring = self._core(self._output, parameters)
        loss, hidden_grad, scoring_grad = linear_cross_entropy(
            hidden, scoring, targets_bt.flatten(), scale, self.chunk
        )
        # The cores' gradients are added here rather than by autograd, each in a fixed order.
        grads, coordinates_grad = pull(hidden_grad)
        looked_up = add_rows(wide(coordinates_grad.flatten(0, 1)), ids_bt.flatten(), core.shape[0])
        cores = {self._output: scoring_grad}
        cores[INPUT] = looked_up + scoring_grad if self._output == INPUT else looked_up
        for name, grad in cores.items():
            grads[f"model.{name}.weight"] = self._tables[name].pull(grad)
        self._observe(statistics)
        named = {name.removeprefix("model."): grad for name, grad in grads.items()}
        return loss, self.arena.layout.flatten(named, self.arena.weights.dtype)

    def _observe(self, statistics: Mapping[str, Tensor]) -> None:
        """Move batch norm's running averages towards what this batch showed."""
        for name, value in statistics.items():
            module, _, buffer = name.rpartition(".")
            running = getattr(self._norms[module], buffer)
            running.add_((value - running) * BatchNorm.momentum)

    def _accumulate(self, ids_bt: Tensor, targets_bt: Tensor, numbers: Tensor) -> Tensor:
        loss, grad = self._backward(ids_bt, targets_bt, numbers[0])
        self.arena.grad.add_(grad)
        return loss

    def _whole_step(
        self, ids_bt: Tensor, targets_bt: Tensor, numbers: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        before = self._averages()
        loss, grad = self._backward(ids_bt, targets_bt, numbers[0])
        return self._finish(grad, loss, numbers, before)

    def _averages(self) -> list[Tensor]:
        """Batch norm's running averages as they are, in case the step must be skipped."""
        return [running.clone() for running in self._running]

    def _finish(
        self, grad: Tensor, loss: Tensor, numbers: Tensor, before: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Check, clip and update; returns loss, norm before clipping, and 1.0 if applied.

        ``before``: the running averages from before the step, which a skipped one puts back.
        """
        arena = self.arena
        norm = torch.linalg.vector_norm(grad) * numbers[1]
        factor, apply = clip_factor(norm, loss, numbers[1], self.config.clip).unbind()
        finite = apply > 0
        grad = torch.where(finite, grad * factor, 0.0)
        self.optimizer.update(arena, grad, numbers[2:], apply)
        for running, kept in zip(self._running, before, strict=True):
            running.copy_(torch.where(finite, running, kept))
        if arena.compute is not arena.weights:
            arena.compute.copy_(arena.weights)
        self._compute_cores()
        return loss, norm, apply


def _factors(parameters: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor | None]:
    """Weight and basis of a table among flat views."""
    return parameters[f"{name}.weight"], parameters.get(f"{name}.basis")

"""One training step: forward, backward, clipping, optimizer and the cast of the weights.

Everything is functional over the arena's flat buffers, so that ``torch.compile`` sees a single graph
with no autograd boundary in it: gradients go from the backward's products straight into the flat
buffer, and one pass updates moments, weights and their low-precision copy. Several micro-batches, and
tables that are updated by rows, take two graphs: up to the summed gradient, and from there.

A step whose loss or gradient is not finite changes nothing but its counters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from cllm.core.config import TrainConfig
from cllm.model.cross_entropy import IGNORE
from cllm.model.norms import BatchNorm
from cllm.model.transformer import Transformer
from cllm.training.arena import Arena
from cllm.training.clipping import clip_factor
from cllm.training.compiled import perhaps_compiled
from cllm.training.draws import Draws
from cllm.training.gradient import Gradients, Micro
from cllm.training.lazy_rows import LazyRows
from cllm.training.optimizer import OPTIMIZERS
from cllm.training.parallel.crew import Crew

if TYPE_CHECKING:
    from cllm.training.distributed.team import Team

LOSS_SCALE_START = 2.0**14
LOSS_SCALE_PATIENCE = 500
"""Steps without overflow after which fp16's loss scale is doubled."""


@dataclass(frozen=True)
class StepResult:
    """What a step reports: mean loss in nats per target token (an estimate where it is trained on sampled
    softmax), gradient norm before clipping, whether the step was applied, and the similarity loss, which
    is no part of the loss but of the norm."""

    loss: float
    grad_norm: float
    applied: bool
    similarity: float | None = None


class Figures(NamedTuple):
    """Scalars of a step: the summed loss, the norm before clipping, 1.0 or 0.0."""

    loss: Tensor
    norm: Tensor
    applied: Tensor
    similarity: Tensor | None


class TrainStep:
    """The compiled (or eager) step over one model and its arena.

    ``draws`` gives what is drawn for a micro-batch; ``crew``, where it is set, computes the gradient with
    other processes; ``team`` makes the whole step with those of torchrun. ``counters`` holds, as scalar
    tensors on the CPU: ``applied`` steps, ``skipped`` steps, ``in_row`` skipped ones since the last
    applied, and for fp16 the ``loss_scale`` and the ``calm`` steps since it changed. ``cores`` holds, by
    table, the computed cores; ``core_uses`` counts how often they were ``computed`` and ``read``.
    """

    def __init__(
        self,
        model: Transformer,
        arena: Arena,
        config: TrainConfig,
        *,
        chunk: int = 0,
        compiled: bool = False,
        draws: Draws | None = None,
    ) -> None:
        self.model, self.arena, self.config = model, arena, config
        self.optimizer = OPTIMIZERS[config.optimizer](config)
        self.draws = draws if draws is not None else Draws()
        self.crew: Crew | None = None
        self.team: Team | None = None
        self.scaling = arena.compute.dtype == torch.float16
        names = ("applied", "skipped", "in_row", "loss_scale", "calm")
        self.counters = {name: torch.zeros(()) for name in names}
        self.counters["loss_scale"].fill_(LOSS_SCALE_START if self.scaling else 1.0)
        self.gradients = Gradients(model, arena, chunk)
        self.lazy = LazyRows(self.gradients, self.optimizer) if arena.by_rows else None
        by_rows = self.lazy.tables if self.lazy is not None else ()
        # Attributes of their own, so that a compiled graph sees tensors and no properties.
        self._dense, self._dense_compute = arena.dense, arena.dense_compute
        self._kept_cores = tuple(name for name in self.cores if name not in by_rows)
        self.core_uses = {"computed": len(self._kept_cores), "read": 0}
        self._running = [
            buffer for m in model.modules() if isinstance(m, BatchNorm) for buffer in m.buffers()
        ]
        self._whole = perhaps_compiled(self._whole_step, compiled)
        self._part = perhaps_compiled(self._accumulate, compiled)
        self._end = perhaps_compiled(self._finish, compiled)
        self._loss = perhaps_compiled(self.gradients.summed_loss, compiled)

    @property
    def cores(self) -> dict[str, Tensor]:
        """Computed cores by table."""
        return self.gradients.cores

    @property
    def number(self) -> int:
        """Steps so far, the skipped ones included: what draws depend on beside the seed."""
        return int(self.counters["applied"]) + int(self.counters["skipped"])

    def __call__(
        self, batches: Sequence[tuple[Tensor, Tensor]], lr: float, similarity: float = 0.0
    ) -> StepResult:
        """Train on micro-batches of (ids, targets), each (B, T) int64 on the model's device.

        ``similarity``: the present weight of the similarity loss, if there is one.
        """
        targets = sum(int((y != IGNORE).sum()) for _, y in batches)
        numbers = self._numbers(1.0 / max(targets, 1), lr)
        if self.team is not None:
            found = self.team.step(batches, numbers.tolist())
        elif self.crew is not None:
            found = self._with_crew(self.crew, batches, numbers)
        elif len(batches) == 1 and self.lazy is None:
            found = self._whole(self._micros(batches, similarity)[0], numbers)
        else:
            found = self._in_parts(self._micros(batches, similarity), numbers, lr)
        self._weights_changed(len(batches))
        values = [value for value in found if value is not None]
        figures = torch.stack(values).tolist()
        self._count(bool(figures[2]))
        return StepResult(
            loss=figures[0] / max(targets, 1),
            grad_norm=figures[1],
            applied=bool(figures[2]),
            similarity=figures[3] if found.similarity is not None else None,
        )

    def _in_parts(self, micros: list[Micro], numbers: Tensor, lr: float) -> Figures:
        before = self._averages()
        self.arena.grad.zero_()
        micros, rows, used = self.lazy.begin(micros) if self.lazy is not None else (micros, {}, {})
        grads = {n: torch.zeros_like(c, dtype=numbers.dtype) for n, c in rows.items()}
        total, similarity = numbers.new_zeros(()), None
        for micro in micros:
            loss, alike = self._part(micro, numbers, rows, grads)
            total += loss
            if alike is not None:
                share = alike / len(micros)
                similarity = share if similarity is None else similarity + share
        square = None
        if self.lazy is not None:
            grads = self.lazy.pull(used, grads)
            square = torch.stack([grad.square().sum() for grad in grads.values()]).sum()
        norm, factor, applied = self._end(self.arena.grad, total, numbers, before, square)
        if self.lazy is not None and bool(applied):
            self.lazy.apply(used, grads, factor, numbers[2:], lr)
        return Figures(total, norm, applied, similarity)

    def _with_crew(
        self, crew: Crew, batches: Sequence[tuple[Tensor, Tensor]], numbers: Tensor
    ) -> Figures:
        """The step of several workers: gradients are added in the workers' order."""
        own = crew.begin(batches, float(numbers[0]))
        total = self.accumulate((Micro(ids, targets) for ids, targets in own), float(numbers[0]))
        for loss, grad in crew.results():
            total += loss
            self.arena.grad.add_(grad)
        return self.finish(self.arena.grad, torch.tensor(total, dtype=numbers.dtype), numbers)

    def finish(self, grad: Tensor, loss: Tensor, numbers: Tensor) -> Figures:
        """Check, clip and update, by a gradient and a loss that were summed elsewhere."""
        norm, _, applied = self._end(grad, loss, numbers, self._averages(), None)
        return Figures(loss, norm, applied, None)

    def accumulate(self, micros: Iterable[Micro], scale: float) -> float:
        """The summed gradient of ``scale`` times the loss of micro-batches goes into ``arena.grad``, in
        their order; returns the summed loss."""
        self.arena.grad.zero_()
        total, numbers = 0.0, self.arena.grad.new_tensor([scale])
        for micro in micros:
            total += float(self._part(micro, numbers, {}, {})[0])
        return total

    def close(self) -> None:
        """Let workers end, or a team, if there is one."""
        for others in (self.crew, self.team):
            if others is not None:
                others.close()

    def refresh(self) -> None:
        """Make everything that follows from the weights theirs again, after a change from outside."""
        self.arena.refresh()
        for table in self.model.tables.values():
            if table.incidence is not None:
                table.incidence.transpose()
        self.gradients.compute_cores(tuple(self.cores))
        if self.lazy is not None:
            self.lazy.take_as_settled(int(self.counters["applied"]))
        self._weights_changed(0)
        if self.team is not None:
            self.team.load()

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Within it the model may be read: it has what others hold, and idle rows are up to date."""
        if self.team is not None:
            self.team.gather()
        with self.lazy.settled() if self.lazy is not None else nullcontext():
            yield

    def settle(self) -> None:
        """Bring the model up to date for good: training is over."""
        if self.team is not None:
            self.team.gather()
        if self.lazy is not None:
            self.lazy.settle()

    def _micros(self, batches: Sequence[tuple[Tensor, Tensor]], similarity: float) -> list[Micro]:
        first = self.number * len(batches)
        factor = similarity * float(self.counters["loss_scale"]) / len(batches)
        weights = self.arena.weights
        return [
            self.draws.micro(ids, targets, first + i, factor, weights)
            for i, (ids, targets) in enumerate(batches)
        ]

    def _weights_changed(self, batches: int) -> None:
        for table in self.model.tables.values():
            table.after_step()
        self.core_uses["computed"] += len(self._kept_cores)
        # Each micro-batch looks its tokens up in the input's core and scores them with the output's.
        self.core_uses["read"] += 2 * batches if self._kept_cores else 0

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

    def gradient(
        self, batches: Sequence[tuple[Tensor, Tensor]], similarity: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Mean loss and the gradient of all that is trained on, flat, without a step."""
        share = 1.0 / sum(int((y != IGNORE).sum()) for _, y in batches)
        numbers = self._numbers(share, 0.0)
        micros = self._micros(batches, similarity)
        micros, rows, used = self.lazy.begin(micros) if self.lazy is not None else (micros, {}, {})
        total, flat = numbers.new_zeros(()), torch.zeros_like(self.arena.weights)
        views = self.arena.layout.views(flat)
        for micro in micros:
            found = self.gradients.backward(micro, numbers[0], rows)
            total = total + found.loss
            flat[: len(found.flat)] += found.flat
            if self.lazy is not None:
                for name, grad in self.lazy.pull(used, found.rows).items():
                    views[f"{name}.weight"].index_add_(0, used[name].rows, grad)
        return total * share, flat * numbers[1]

    def evaluate(self, ids_bt: Tensor, targets_bt: Tensor) -> Tensor:
        """Summed exact loss of a batch in nats; the model must be in eval mode, as it was compiled for."""
        if self.team is not None:
            return self.team.evaluate(ids_bt, targets_bt)
        return self.evaluate_here(ids_bt, targets_bt)

    def evaluate_here(self, ids_bt: Tensor, targets_bt: Tensor) -> Tensor:
        """The same in this process alone."""
        assert not self.model.training
        with torch.no_grad():
            return self._loss(ids_bt, targets_bt)

    def evaluate_eagerly(self, ids_bt: Tensor, targets_bt: Tensor) -> Tensor:
        """The same without compiled code, in whatever mode the model's parts are."""
        with torch.no_grad():
            return self.gradients.summed_loss(ids_bt, targets_bt)

    def _accumulate(
        self, micro: Micro, numbers: Tensor, rows: dict[str, Tensor], grads: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        found = self.gradients.backward(micro, numbers[0], rows)
        self.arena.grad.add_(found.flat)
        for name, grad in grads.items():
            grad.add_(found.rows[name])
        return found.loss, found.similarity

    def _whole_step(self, micro: Micro, numbers: Tensor) -> Figures:
        before = self._averages()
        found = self.gradients.backward(micro, numbers[0], {})
        norm, _, applied = self._finish(found.flat, found.loss, numbers, before, None)
        return Figures(found.loss, norm, applied, found.similarity)

    def _averages(self) -> list[Tensor]:
        """Batch norm's running averages as they are, in case the step must be skipped."""
        return [running.clone() for running in self._running]

    def _finish(
        self,
        grad: Tensor,
        loss: Tensor,
        numbers: Tensor,
        before: list[Tensor],
        square: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Check, clip and update; returns the norm before clipping, the factor of the gradient, and 1.0 if
        applied.

        ``before``: the running averages from before the step, which a skipped one puts back. ``square``:
        the squared norm of the gradient outside the dense part, if there is any.
        """
        norm = torch.linalg.vector_norm(grad)
        if square is not None:
            norm = (norm * norm + square).sqrt()
        norm = norm * numbers[1]
        factor, apply = clip_factor(norm, loss, numbers[1], self.config.clip).unbind()
        finite = apply > 0
        grad = torch.where(finite, grad * factor, 0.0)
        self.optimizer.update(self._dense, grad, numbers[2:], apply)
        for running, kept in zip(self._running, before, strict=True):
            running.copy_(torch.where(finite, running, kept))
        if self._dense_compute is not self._dense.weights:
            self._dense_compute.copy_(self._dense.weights)
        self.gradients.compute_cores(self._kept_cores)
        return norm, factor, apply

"""One training step: forward, backward, clipping, optimizer and the cast of the weights.

Forward and backward are functional over the arena's flat buffers, so that ``torch.compile`` sees a single
graph with no autograd boundary in it, whose gradients go into the arena's. What ends the step is
``cllm.training.update``. Nothing outside that graph allocates memory once a step has been made, but for
tables that are updated by rows and what is drawn for a step.

A step whose loss or gradient is not finite changes nothing but its counters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cllm.core.config import TrainConfig
from cllm.model.norms import BatchNorm
from cllm.model.transformer import Transformer
from cllm.training.arena import Arena
from cllm.training.compiled import perhaps_compiled
from cllm.training.counters import count_step, new_counters
from cllm.training.draws import Draws
from cllm.training.feed import target_count
from cllm.training.figures import Figures, Numbers, StepResult, Summed
from cllm.training.gradient import INPUT, Gradients, Micro
from cllm.training.in_backward import InBackward
from cllm.training.lazy_rows import LazyRows
from cllm.training.parallel.crew import Crew
from cllm.training.update import Update

if TYPE_CHECKING:
    from cllm.training.distributed.team import Team
    from cllm.training.interrupt import Interrupt


class TrainStep:
    """The compiled (or eager) step over one model and its arena.

    ``draws`` gives what is drawn for a micro-batch; ``crew``, where it is set, computes the gradient with
    other processes; ``team`` makes the whole step with those of torchrun. ``counters``: see
    ``cllm.training.counters``. ``early``: where it is set, updates within the backward pass. ``cores``
    holds, by table, the computed cores; ``core_uses`` counts how often they were ``computed`` and ``read``.
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
        self.model, self.arena, self.config, self.compiled = model, arena, config, compiled
        self.update = Update(arena, config)
        self.optimizer = self.update.optimizer
        self.draws = draws if draws is not None else Draws()
        self.crew: Crew | None = None
        self.team: Team | None = None
        self.scaling = arena.compute.dtype == torch.float16
        self.counters = new_counters(self.scaling)
        self.gradients = Gradients(model, arena, chunk)
        self.lazy = LazyRows(self.gradients, self.optimizer) if arena.by_rows else None
        early = config.optimizer_in_backward
        self.early = InBackward(arena, self.gradients, self.optimizer) if early else None
        by_rows = self.lazy.tables if self.lazy is not None else ()
        self._kept_cores = tuple(name for name in self.cores if name not in by_rows)
        self.core_uses = {"computed": 0, "read": 0}
        self._running = [
            buffer for m in model.modules() if isinstance(m, BatchNorm) for buffer in m.buffers()
        ]
        self._kept = [torch.empty_like(buffer) for buffer in self._running]
        self._begun = self._torn = False
        self._only = perhaps_compiled(self._take_gradient, compiled)
        self._part = perhaps_compiled(self._add_gradient, compiled)
        self._cores = perhaps_compiled(self.gradients.compute_cores, compiled)
        self._loss = perhaps_compiled(self.gradients.summed_loss, compiled)
        # The factor of a micro-batch's loss, and the sum of their losses.
        self._scale, self._total = arena.weights.new_zeros(()), arena.weights.new_zeros(())

    @property
    def cores(self) -> dict[str, Tensor]:
        """Computed cores by table."""
        return self.gradients.cores

    @property
    def _ending(self) -> Update | Crew:
        """Who ends the step."""
        return self.update if self.crew is None else self.crew

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
        targets, loss_scale = target_count(batches), float(self.counters["loss_scale"])
        at = int(self.counters["applied"]) + 1
        numbers = Numbers(loss_scale / max(targets, 1), 1.0 / loss_scale, lr, at)
        if self.team is not None:
            found = self.team.step(batches, numbers)
        else:
            for kept, running in zip(self._kept, self._running, strict=True):
                kept.copy_(running)
            self._begun = True
            if self.early is not None:
                found = self._early_step(self.early, self._micros(batches, similarity), numbers)
            else:
                if self.crew is not None:
                    summed = self._with_crew(self.crew, batches, numbers.scale)
                else:
                    summed = self._summed(self._micros(batches, similarity), numbers.scale)
                found = self.finish(summed, self.arena.grad, numbers)
        self._weights_changed(len(batches))
        self.count(found.applied)
        self._begun = self._torn = False
        mean = found.loss / max(targets, 1)
        return StepResult(mean, found.norm, found.applied, found.similarity)

    def finish(self, summed: Summed, grad: Tensor, numbers: Numbers) -> Figures:
        """Check, clip and update with a summed gradient; what is not finite changes nothing."""
        dense = self._ending.norm(grad)
        norm = math.hypot(dense, math.sqrt(summed.square)) * numbers.unscale
        applied = math.isfinite(norm) and math.isfinite(summed.loss)
        if applied:
            self._apply(summed, grad, norm, numbers)
        else:
            self._restore()
        return Figures(summed.loss, norm, applied, summed.similarity)

    def _early_step(self, early: InBackward, micros: list[Micro], numbers: Numbers) -> Figures:
        (micro,) = micros
        self._torn = True
        found = early.step(micro, numbers)
        if not found.applied:
            self._restore()
        elif self._kept_cores:
            self._cores(self._kept_cores)
        return found

    def _restore(self) -> None:
        """Batch norm's averages are as before the step."""
        for kept, running in zip(self._kept, self._running, strict=True):
            running.copy_(kept)

    def _summed(self, micros: list[Micro], scale: float) -> Summed:
        found = Summed(0.0)
        rows: dict[str, Tensor] = {}
        if self.lazy is not None:
            micros, rows, found.used = self.lazy.begin(micros)
        grads = {n: torch.zeros_like(c, dtype=self._scale.dtype) for n, c in rows.items()}
        found.loss, found.similarity = self._backward(micros, len(micros), scale, rows, grads)
        if self.lazy is not None:
            found.rows = self.lazy.pull(found.used, grads)
            found.square = sum(float(grad.square().sum()) for grad in found.rows.values())
        return found

    def _with_crew(
        self, crew: Crew, batches: Sequence[tuple[Tensor, Tensor]], scale: float
    ) -> Summed:
        """The loss of several workers, whose gradients the crew adds up at the end of the step."""
        own = crew.begin(batches, scale)
        micros = (Micro(ids, targets) for ids, targets in own)
        total = self.accumulate(micros, len(crew.shards[0]), scale)
        return Summed(sum(crew.results(), total))

    def accumulate(self, micros: Iterable[Micro], count: int, scale: float) -> float:
        """The summed gradient of ``scale`` times the loss of ``count`` micro-batches goes into
        ``arena.grad``, in their order; returns the summed loss."""
        return self._backward(micros, count, scale, {}, {})[0]

    def _backward(
        self,
        micros: Iterable[Micro],
        count: int,
        scale: float,
        rows: dict[str, Tensor],
        grads: dict[str, Tensor],
    ) -> tuple[float, float | None]:
        self._scale.fill_(scale)
        self._total.zero_()
        part = self._only if count == 1 else self._part
        if count != 1:
            self.arena.grad.zero_()
        similarity = None
        for micro in micros:
            loss, alike = part(micro, self._scale, rows, grads)
            self._total.add_(loss)
            if alike is not None:
                similarity = (similarity or 0.0) + float(alike) / count
        return float(self._total), similarity

    def _apply(self, summed: Summed, grad: Tensor, norm: float, numbers: Numbers) -> None:
        self._torn = True
        factor = self._ending.apply(grad, norm, numbers.unscale, numbers.lr, numbers.at)
        if self.lazy is not None:
            self.lazy.apply(summed.used, summed.rows, factor, numbers.lr, numbers.at)
        if self._kept_cores:
            self._cores(self._kept_cores)

    @property
    def is_whole(self) -> bool:
        """Whether weights, moments and counters belong together: none of them is being changed, and none
        was when a step was given up."""
        return not self._torn and (self.lazy is None or not self.lazy.is_torn)

    def undo(self) -> None:
        """Forget a step that was given up before its update."""
        if self._begun:
            self._restore()
            self._begun = False

    def close(self) -> None:
        """Let workers end, or a team, if there is one."""
        for others in (self.crew, self.team):
            if others is not None:
                others.close()

    def heed(self, interrupt: Interrupt) -> None:
        """Let other processes' end, and what all do, be given up."""
        if self.crew is not None:
            self.crew.when_lost = interrupt.end_with
        if self.team is not None:
            interrupt.leave = self.team.leave

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
        if batches:  # which have read what was computed once before them
            self.core_uses["computed"] += len(self._kept_cores)
            self._count_reads(batches)

    def _count_reads(self, batches: int) -> None:
        """Each batch looks its tokens up in the input's core and scores them with the output's."""
        both = [INPUT, self.gradients.output]
        self.core_uses["read"] += batches * sum(name in self._kept_cores for name in both)

    def count(self, applied: bool) -> None:
        """Count a step, and adapt fp16's loss scale."""
        count_step(self.counters, applied, self.scaling)

    def gradient(
        self, batches: Sequence[tuple[Tensor, Tensor]], similarity: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Mean loss and the gradient of all that is trained on, flat, without a step."""
        share, loss_scale = 1.0 / target_count(batches), float(self.counters["loss_scale"])
        scale = torch.full_like(self._scale, share * loss_scale)
        micros = self._micros(batches, similarity)
        micros, rows, used = self.lazy.begin(micros) if self.lazy is not None else (micros, {}, {})
        total, flat = torch.zeros_like(scale), torch.zeros_like(self.arena.weights)
        views = self.arena.layout.views(flat)
        for micro in micros:
            found = self.gradients.backward(micro, scale, rows)
            total = total + found.loss
            flat[: len(found.flat)] += found.flat
            if self.lazy is not None:
                for name, grad in self.lazy.pull(used, found.rows).items():
                    views[f"{name}.weight"].index_add_(0, used[name].rows, grad)
        return total * share, flat / loss_scale

    @property
    def rows_at_once(self) -> int:
        """Windows of a batch that ``evaluate`` scores best."""
        rows = self.config.batch_size
        return rows if self.team is None else self.team.member.rows_at_once(rows)

    def evaluate(self, ids_bt: Tensor, targets_bt: Tensor) -> Tensor:
        """Summed exact loss of a batch in nats; the model must be in eval mode, as it was compiled for."""
        if self.team is not None:
            return self.team.evaluate(ids_bt, targets_bt)
        return self.evaluate_here(ids_bt, targets_bt)

    def evaluate_here(self, ids_bt: Tensor, targets_bt: Tensor) -> Tensor:
        """The same in this process alone."""
        assert not self.model.training
        self._count_reads(1)
        with torch.no_grad():
            return self._loss(ids_bt, targets_bt)

    def evaluate_eagerly(self, ids_bt: Tensor, targets_bt: Tensor) -> Tensor:
        """The same without compiled code, in whatever mode the model's parts are."""
        with torch.no_grad():
            return self.gradients.summed_loss(ids_bt, targets_bt)

    def _take_gradient(
        self, micro: Micro, scale: Tensor, rows: dict[str, Tensor], grads: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        found = self.gradients.backward(micro, scale, rows)
        self.arena.grad.copy_(found.flat)
        for name, grad in grads.items():
            grad.copy_(found.rows[name])
        return found.loss, found.similarity

    def _add_gradient(
        self, micro: Micro, scale: Tensor, rows: dict[str, Tensor], grads: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        found = self.gradients.backward(micro, scale, rows)
        self.arena.grad.add_(found.flat)
        for name, grad in grads.items():
            grad.add_(found.rows[name])
        return found.loss, found.similarity

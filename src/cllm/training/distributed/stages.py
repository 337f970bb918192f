"""The layers in stages, each in a process: ``torch.distributed.pipelining``.

A step's windows pass through the stages in micro-batches, one behind the other; the schedule says who
computes what when: GPipe (Huang et al. 2019), 1F1B (PipeDream-Flush, Narayanan et al. 2021), interleaved
1F1B (the same, section 2.2), zero bubble and its V shape (Qi et al. 2024). Each gives the gradient of the
whole step. A tied table is in the first and the last stage, whose gradients of it are added.

A process has an arena of its own over its stages' parameters, and the same update rules as one process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.nn import functional

from cllm.core.config import Config
from cllm.model.cross_entropy import IGNORE
from cllm.model.embedding import Embedding
from cllm.model.transformer import Transformer
from cllm.training.arena import Arena
from cllm.training.choose import arithmetic
from cllm.training.distributed.check import micro_batches_of
from cllm.training.distributed.member import Member
from cllm.training.distributed.shares import packed, padded
from cllm.training.distributed.stage_layers import Cast, Layers, Plan
from cllm.training.feed import MicroBatches
from cllm.training.figures import Figures, Numbers
from cllm.training.optimizer import OPTIMIZERS
from cllm.training.parallel.shards import Shard
from cllm.training.step import TrainStep
from cllm.training.update import Update

SCHEDULES: dict[str, Callable[..., Any]] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zero-bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}


class Stages(Member):
    """See above. ``home``: the whole model, in the first process alone."""

    def __init__(self, config: Config, size: int, home: TrainStep | None) -> None:
        train = config.train
        self.config, self.home, self.size, self.rank = config, home, size, dist.get_rank()
        self.device = torch.device(train.device)
        self.plan = Plan(config, size)
        self.mine = self.plan.stages_of(self.rank)
        self.own = self._own_modules()
        self.arena = Arena.adopt(
            self.own, torch.get_default_dtype(), OPTIMIZERS[train.optimizer].moments
        )
        self.update = Update(self.arena, train)
        self._grads = self.arena.layout.views(self.arena.grad)
        self._scale = torch.ones((), device=self.device)
        self.parts = micro_batches_of(train, size)
        self._schedule = self._make_schedule()
        ends = {self.plan.ranks[0], self.plan.ranks[-1]}
        self._tied = config.model.tie_embeddings and len(ends) == 2
        self._ends = dist.new_group(sorted(ends)) if self._tied else None
        self._warm_up()

    def load(self) -> None:
        whole = dict(self._whole())
        mine = dict(self._held())
        for key, like in self._shapes():
            scratch = torch.empty(like.shape, dtype=like.dtype, device=self.device)
            if self.rank == 0:
                scratch.copy_(whole[key])
            dist.broadcast(scratch, 0)
            if key in mine:
                mine[key].copy_(scratch)
        self._changed()

    def step_windows(self, batches: MicroBatches) -> list[Tensor]:
        rows = self.config.train.batch_size
        together = packed(batches, [Shard(micro, 0, rows) for micro in range(len(batches))])
        return [together] * self.size

    def step(self, windows: Tensor, numbers: Numbers) -> Figures:
        self._scale.fill_(numbers.scale)
        self._set_mode(training=True)
        self.arena.grad.zero_()
        total = self._pass(windows, self._schedule.step) / numbers.scale
        for name, view in self._grads.items():
            if self._tied and name.startswith("embedding.") and self._at_an_end:
                dist.all_reduce(view, group=self._ends)
        square = torch.zeros((), dtype=torch.float64, device=self.device)
        for name, view in self._grads.items():
            if self.plan.owner(name) == self.rank:
                square += view.double().square().sum()
        dist.all_reduce(square)
        norm, loss = math.sqrt(float(square)) * numbers.unscale, float(total)
        applied = math.isfinite(norm) and math.isfinite(loss)
        if applied:
            self.update.apply(self.arena.grad, norm, numbers.unscale, numbers.lr, numbers.at)
        self._changed()
        return Figures(loss, norm, applied)

    def rows_at_once(self, batch_size: int) -> int:
        """All of a step's: the pipeline is filled with as many, or with rows that count for nothing."""
        return batch_size * self.config.train.accumulate if self.scores else batch_size

    def evaluation_windows(self, ids_bt: Tensor, targets_bt: Tensor) -> list[Tensor]:
        rows = self.rows_at_once(self.config.train.batch_size)
        pair = padded(ids_bt, targets_bt, rows)
        return [torch.stack(pair)[:, None].cpu()] * self.size

    def evaluate(self, windows: Tensor) -> Tensor:
        self._scale.fill_(1.0)
        self._set_mode(training=False)
        with torch.no_grad():
            return self._pass(windows, self._schedule.eval)

    @property
    def scores(self) -> bool:
        """Not in a V: torch's schedule of that shape has no forward alone (as of 2.13)."""
        return self.config.train.pipeline.schedule != "zbv"

    def gather(self) -> None:
        whole, mine = dict(self._whole()), dict(self._held())
        for key, like in self._shapes():
            owner = self.plan.owner(key.partition("/")[2])
            if self.rank == owner == 0:
                whole[key].copy_(mine[key])
            elif self.rank == owner:
                dist.send(mine[key].contiguous(), 0)
            elif self.rank == 0:
                scratch = torch.empty(like.shape, dtype=like.dtype, device=self.device)
                dist.recv(scratch, owner)
                whole[key].copy_(scratch)
        if self.home is not None:
            self.home.arena.refresh()
            self.home.gradients.compute_cores(tuple(self.home.cores))

    @property
    def _at_an_end(self) -> bool:
        return self.rank in (self.plan.ranks[0], self.plan.ranks[-1])

    def _own_modules(self) -> nn.Module:
        """This process's modules under the names that the whole model has for them, not filled yet."""
        model = self.config.model
        with torch.device("meta"):
            whole = Transformer(model, self.config.train.attention)
        first, last = 0 in self.mine, self.plan.count - 1 in self.mine
        own: Any = nn.Module()
        wanted = [layer for stage in self.mine for layer in self.plan.layers[stage]]
        own.layers = nn.ModuleDict({str(layer): whole.layers[layer] for layer in wanted})
        own.embedding = whole.embedding if first or (last and model.tie_embeddings) else None
        own.positions = whole.positions if first else None
        own.norm = whole.norm if last else None
        own.head = whole.head if last else None
        own.to_empty(device=self.device)
        with torch.no_grad():
            for parameter in own.parameters():
                parameter.zero_()
        assert isinstance(own, nn.Module)
        return own

    def _make_schedule(self) -> Any:
        train, count = self.config.train, self.plan.count
        dtype, stages = arithmetic(train), []
        self._modules: list[nn.Module] = []
        for number in self.mine:
            ends = (number == 0, number == count - 1)
            part: nn.Module = Layers(self.own, self.config, self.plan.layers[number], ends)
            if dtype != self.arena.weights.dtype:
                part = Cast(part, dtype)
            self._modules.append(part)
            stages.append(PipelineStage(part, number, count, self.device))
        made = SCHEDULES[train.pipeline.schedule]
        given = stages[0] if train.pipeline.stages_of_each == 1 else stages
        for name, parameter in self.own.named_parameters():
            parameter.grad = self._grads[name]
        return made(given, self.parts, loss_fn=self._loss, scale_grads=False)

    def _loss(self, logits_btv: Tensor, targets_bt: Tensor) -> Tensor:
        loss = functional.cross_entropy(
            logits_btv.flatten(0, 1), targets_bt.flatten(), ignore_index=IGNORE, reduction="sum"
        )
        return loss * self._scale

    def _warm_up(self) -> None:
        """One pass whose gradient is thrown away: in the first, stages learn each other's shapes, and
        would draw other dropout than a run that goes on without a break."""
        train = self.config.train
        shape = (2, train.accumulate, train.batch_size, self.config.model.context)
        self._pass(torch.zeros(shape, dtype=torch.int64), self._schedule.step)

    def _pass(self, windows: Tensor, run: Callable[..., Any]) -> Tensor:
        """All windows through all stages; the summed (and scaled) loss, float64, in every process."""
        ids, targets = windows.flatten(1, 2).to(self.device)
        losses: list[Tensor] = []
        arguments = (ids,) if 0 in self.mine else ()
        target = targets if self.plan.count - 1 in self.mine else None
        kept = {"losses": losses} if target is not None else {}
        run(*arguments, target=target, return_outputs=False, **kept)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for loss in losses:
            total += loss.detach().double()
        dist.all_reduce(total)
        return total

    def _whole(self) -> Iterator[tuple[str, Tensor]]:
        """Kind and name of all weights, moments and buffers of the whole model."""
        if self.home is not None:
            yield from _named(self.home.arena, self.home.model)

    def _held(self) -> Iterator[tuple[str, Tensor]]:
        yield from _named(self.arena, self.own)

    def _shapes(self) -> Iterator[tuple[str, Tensor]]:
        with torch.device("meta"):
            model = Transformer(self.config.model)
        moments = OPTIMIZERS[self.config.train.optimizer].moments
        for name, parameter in model.named_parameters():
            for kind in ("weights", *moments):
                yield f"{kind}/{name}", parameter
        for name, buffer in _lasting(model):
            yield f"buffers/{name}", buffer

    def _set_mode(self, *, training: bool) -> None:
        for module in self._modules:
            module.train(training)

    def _changed(self) -> None:
        for module in self.own.modules():
            if isinstance(module, Embedding):
                module.after_step()


def _named(arena: Arena, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, view in arena.layout.views(arena.weights).items():
        yield f"weights/{name}", view
    for moment, views in arena.named_moments().items():
        for name, view in views.items():
            yield f"{moment}/{name}", view
    for name, buffer in _lasting(model):
        yield f"buffers/{name}", buffer


def _lasting(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that a checkpoint has (an incidence; not the rotary tables)."""
    kept = model.state_dict(keep_vars=True)
    for name, buffer in model.named_buffers():
        if name in kept:
            yield name, buffer

"""All weights in each process: torch's DistributedDataParallel over the arena.

The arena's flat buffer is the one parameter that DDP sees. Forward and backward are the same (compiled)
functions as in one process; what autograd hands to DDP is their finished gradient, which DDP averages over
the processes. Each process then makes the same optimizer's step, and the weights stay the same everywhere.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cllm.core.config import Config
from cllm.training.distributed.member import Member
from cllm.training.distributed.shares import evaluation_parts, packed
from cllm.training.feed import MicroBatches
from cllm.training.figures import Figures, Numbers, Summed
from cllm.training.gradient import Micro
from cllm.training.parallel.shards import deal_evenly
from cllm.training.step import TrainStep


class _Hand(torch.autograd.Function):
    """The identity of a number, whose gradient with respect to the weights is given."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return weights.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient, None


class _Flat(nn.Module):
    """The arena's weights as one parameter."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights)

    def forward(self, gradient: Tensor) -> Tensor:
        handed: Tensor = _Hand.apply(self.weights, gradient)
        return handed


class Replicas(Member):
    """See above; the arena is ``own``'s."""

    def __init__(self, config: Config, size: int, own: TrainStep) -> None:
        train = config.train
        self.model, self.own, self.size = own.model, own, size
        self.shards = deal_evenly(train.batch_size, train.accumulate, size)
        weights = own.arena.weights
        cuda = [weights.device.index] if weights.is_cuda else None
        self._ddp = DistributedDataParallel(
            _Flat(weights), device_ids=cuda, gradient_as_bucket_view=True
        )

    def load(self) -> None:
        """The first's weights, optimizer state and buffers (an incidence) in all processes."""
        arena = self.own.arena
        for tensor in (arena.weights, *arena.moments.values(), *self.model.buffers()):
            dist.broadcast(tensor, 0)
        if dist.get_rank() > 0:
            self.own.refresh()

    def step_windows(self, batches: MicroBatches) -> list[Tensor]:
        return [packed(batches, shards) for shards in self.shards]

    def step(self, windows: Tensor, numbers: Numbers) -> Figures:
        ids, targets = windows.to(self.own.arena.weights.device)
        micros = [Micro(*pair) for pair in zip(ids, targets, strict=True)]
        arena, parameter = self.own.arena, self._ddp.module.weights
        # DDP divides by the number of processes, and the sum is wanted.
        loss = self.own.accumulate(micros, len(micros), numbers.scale * self.size)
        if parameter.grad is not None:
            parameter.grad.zero_()
        self._ddp(arena.grad).backward()
        total = torch.tensor(loss, dtype=torch.float64)
        dist.all_reduce(total)
        assert parameter.grad is not None
        return self.own.finish(Summed(float(total)), parameter.grad, numbers)

    def evaluation_windows(self, ids_bt: Tensor, targets_bt: Tensor) -> list[Tensor]:
        return evaluation_parts(ids_bt, targets_bt, self.size)

    def evaluate(self, windows: Tensor) -> Tensor:
        ids, targets = windows[:, 0].to(self.own.arena.weights.device)
        self.model.eval()
        loss = self.own.evaluate_here(ids, targets).double().cpu()
        self.model.train()
        dist.all_reduce(loss)
        return loss

    def gather(self) -> None:
        """Nothing: the first has all."""

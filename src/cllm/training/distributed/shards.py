"""A share of the weights in each process: torch's FSDP2 (``fully_shard``; Zhao et al. 2023).

Each layer is gathered for its forward and its backward alone, and its gradient is summed and scattered. Of
its shares a process has the optimizer's state, which our own update rules change: they work on any tensors,
so that the arithmetic is the one of a single process. The first process has the whole weights on the CPU
besides, to begin with, to write text with and to convert.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from cllm.core.config import Config
from cllm.model.cross_entropy import cross_entropy_sum
from cllm.model.transformer import Transformer
from cllm.store.sharded import write_shards
from cllm.training.arena import Part
from cllm.training.choose import arithmetic
from cllm.training.clipping import clip_factor
from cllm.training.distributed.member import Writer
from cllm.training.distributed.shares import evaluation_parts, packed
from cllm.training.feed import MicroBatches
from cllm.training.figures import Figures, Numbers
from cllm.training.optimizer import OPTIMIZERS
from cllm.training.parallel.shards import deal_evenly
from cllm.training.step import TrainStep


class _Losses(nn.Module):
    """The model with its summed loss, so that all parameters are used within one forward."""

    def __init__(self, model: Transformer, chunk: int) -> None:
        super().__init__()
        self.model, self.chunk = model, chunk

    def forward(self, ids_bt: Tensor, targets_bt: Tensor) -> Tensor:
        output = self.model.output
        hidden = output.contract(self.model.hidden(ids_bt)).flatten(0, 1)
        core = output.core().to(hidden.dtype)
        return cross_entropy_sum(hidden, core, targets_bt.flatten(), self.chunk)


class Shards(Writer):
    """See above. ``home`` is the whole model; only the first process's is kept up to date."""

    def __init__(self, config: Config, size: int, home: TrainStep | None) -> None:
        train = config.train
        assert isinstance(train.loss_chunk, int)
        self.train, self.home, self.size = train, home, size
        self.optimizer = OPTIMIZERS[train.optimizer](train)
        self.shards = deal_evenly(train.batch_size, train.accumulate, size)
        self.device = torch.device(train.device)
        with torch.device("meta"):  # a device has its shares, and never the whole
            self.model = Transformer(config.model, train.attention)
        self._mesh = init_device_mesh(self.device.type, (size,))
        dtype, master = arithmetic(train), torch.get_default_dtype()
        policy = MixedPrecisionPolicy(
            param_dtype=None if dtype == master else dtype, reduce_dtype=master
        )
        self._losses = _Losses(self.model, train.loss_chunk)
        for module in (*self.model.layers, self._losses):
            fully_shard(module, mesh=self._mesh, mp_policy=policy)
        self._losses.to_empty(device=self.device)  # filled by ``load``
        for fsdp in self._losses.modules():
            if isinstance(fsdp, FSDPModule):
                fsdp.set_gradient_divide_factor(1.0)  # the sum is wanted,
                fsdp.set_force_sum_reduction_for_comms(True)  # and gloo has no scaled one
        names = self.optimizer.moments
        self._parts = {
            name: Part(
                weights=_local(p),
                decays=p.dim() > 1,
                moments={moment: torch.zeros_like(_local(p)) for moment in names},
            )
            for name, p in self.model.named_parameters()
        }

    def load(self) -> None:
        if self.home is not None:
            theirs = dict(self.home.model.named_buffers())
            for name, buffer in self.model.named_buffers():
                buffer.copy_(theirs[name])
        for buffer in self.model.buffers():
            dist.broadcast(buffer, 0)
        for name, part, whole, moments in self._named():
            parameter = self.model.get_parameter(name)
            part.weights.copy_(self._scatter(whole, parameter))
            for moment, view in moments.items():
                part.moments[moment].copy_(self._scatter(view, parameter))
        for table in self.model.tables.values():
            if table.incidence is not None:
                table.incidence.transpose()
            table.after_step()

    def step_windows(self, batches: MicroBatches) -> list[Tensor]:
        return [packed(batches, shards) for shards in self.shards]

    def step(self, windows: Tensor, numbers: Numbers) -> Figures:
        total = torch.zeros((), dtype=torch.float64)
        self.model.train()
        for ids, targets in zip(*windows.to(self.device), strict=True):
            loss = self._losses(ids, targets)
            (loss * numbers.scale).backward()
            total += loss.detach().double().cpu()
        dist.all_reduce(total)
        grads = {name: _grad(p) for name, p in self.model.named_parameters()}
        square = torch.stack([g.double().square().sum() for g in grads.values()]).sum()
        dist.all_reduce(square)
        norm, loss = math.sqrt(float(square)) * numbers.unscale, float(total)
        applied = math.isfinite(norm) and math.isfinite(loss)
        if applied:
            factor = numbers.unscale * clip_factor(norm, self.train.clip)
            for name, part in self._parts.items():
                self.optimizer.update(part, grads[name], factor, numbers.lr, numbers.at)
        self._losses.zero_grad()
        for table in self.model.tables.values():
            table.after_step()
        return Figures(loss, norm, applied)

    def evaluation_windows(self, ids_bt: Tensor, targets_bt: Tensor) -> list[Tensor]:
        return evaluation_parts(ids_bt, targets_bt, self.size)

    def evaluate(self, windows: Tensor) -> Tensor:
        ids, targets = windows[:, 0].to(self.device)
        self.model.eval()
        with torch.no_grad():
            loss = self._losses(ids, targets).double().cpu()
        dist.all_reduce(loss)
        return loss

    def gather(self) -> None:
        for name, part, whole, moments in self._named():
            parameter = self.model.get_parameter(name)
            self._bring(part.weights, parameter, whole)
            for moment, view in moments.items():
                self._bring(part.moments[moment], parameter, view)
        if self.home is not None:
            self.home.arena.refresh()
            self.home.gradients.compute_cores(tuple(self.home.cores))

    def save(self, directory: Path) -> None:
        kept = set(dict(self.model.named_parameters()))
        tensors: dict[str, Tensor] = {
            f"weights/{name}": tensor
            for name, tensor in self.model.state_dict().items()
            if name not in kept  # an incidence, which all have alike
        }
        for name, part, _, _ in self._named():
            parameter = self.model.get_parameter(name)
            tensors[f"weights/{name}"] = self._shared(part.weights, parameter)
            for moment, local in part.moments.items():
                tensors[f"{moment}/{name}"] = self._shared(local, parameter)
        write_shards(directory, tensors)

    def _named(self) -> Iterator[tuple[str, Part, Tensor, dict[str, Tensor]]]:
        """Name, share, and where the whole weights and moments are in the first process (elsewhere: some
        tensor of their shape)."""
        for name, part in self._parts.items():
            if self.home is None:
                whole = torch.empty(self.model.get_parameter(name).shape)
                yield name, part, whole, dict.fromkeys(part.moments, whole)
            else:
                arena = self.home.arena
                views, moments = arena.layout.views(arena.weights), arena.named_moments()
                yield name, part, views[name], {m: moments[m][name] for m in part.moments}

    def _scatter(self, whole: Tensor, like: nn.Parameter) -> Tensor:
        assert isinstance(like, DTensor)
        found = distribute_tensor(
            whole.to(self.device), self._mesh, like.placements, src_data_rank=0
        )
        return found.to_local()

    def _shared(self, local: Tensor, like: nn.Parameter) -> DTensor:
        assert isinstance(like, DTensor)
        return DTensor.from_local(
            local,
            self._mesh,
            like.placements,
            run_check=False,
            shape=like.shape,
            stride=like.stride(),
        )

    def _bring(self, local: Tensor, like: nn.Parameter, whole: Tensor) -> None:
        full = self._shared(local, like).full_tensor()
        if self.home is not None:
            whole.copy_(full)


def _local(parameter: Tensor) -> Tensor:
    assert isinstance(parameter, DTensor)
    return parameter.to_local().detach()


def _grad(parameter: Tensor) -> Tensor:
    return torch.zeros_like(_local(parameter)) if parameter.grad is None else _local(parameter.grad)

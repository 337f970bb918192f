"""The memory that parent and workers share, and what lies in it beside the arena's own buffers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cllm.core.config import Config
from cllm.core.shared_memory import SharedMemory
from cllm.model.transformer import Transformer
from cllm.training.arena import Arena
from cllm.training.clipping import BLOCKS
from cllm.training.optimizer import OPTIMIZERS
from cllm.training.parallel.shards import Shard


def reserve(config: Config) -> SharedMemory:
    """Memory for all that the workers of ``config`` share; more than enough, as what is not used takes
    none."""
    train, shape = config.train, config.model
    assert isinstance(train.parallel.workers, int)
    with torch.device("meta"):
        model = Transformer(shape)
    weights = sum(p.numel() + 64 for p in model.parameters())
    buffers = sum(b.numel() + 64 for b in model.buffers())
    cores = 2 * ((shape.vocab_size or 0) * shape.d_model + 64)
    batches = 2 * train.accumulate * train.batch_size * shape.context
    held = 2 + len(OPTIMIZERS[train.optimizer].moments) + train.parallel.workers
    numbers = held * weights + cores + batches + buffers
    return SharedMemory.create(8 * numbers + 2**20)


class Shared:
    """What parent and workers share, taken in the same order by each: the batch, each worker's gradient,
    the norms of its sum's blocks, the cores that are computed, the model's buffers. (Weights and moments
    are the arena's.)"""

    def __init__(
        self, memory: SharedMemory, config: Config, arena: Arena, cores: dict[str, Tensor]
    ) -> None:
        train, workers = config.train, config.train.parallel.workers
        assert isinstance(workers, int)
        shape = (2, train.accumulate, train.batch_size, config.model.context)
        self.batch = memory.take(shape, torch.int64)
        self.grads = [memory.take(arena.grad.shape, arena.grad.dtype) for _ in range(workers)]
        self.norms = memory.take((BLOCKS + 1,), arena.grad.dtype)
        self.cores = {
            name: memory.take(core.shape, core.dtype) for name, core in sorted(cores.items())
        }
        self.memory = memory

    def buffers(self, model: Transformer) -> dict[str, Tensor]:
        """Places for the model's buffers; to be asked for once."""
        named = sorted(model.named_buffers())
        return {name: self.memory.take(b.shape, b.dtype) for name, b in named}

    def share(self, shards: Sequence[Shard]) -> list[tuple[Tensor, Tensor]]:
        """(ids, targets) of some shards of the present batch."""
        ids, targets = self.batch
        return [
            (ids[s.micro, s.first : s.last], targets[s.micro, s.first : s.last]) for s in shards
        ]

"""Windows as the processes of torchrun are sent them: equal parts, as all take part in every exchange."""

from __future__ import annotations

import torch
from torch import Tensor

from cllm.text.batches import IGNORED
from cllm.training.feed import MicroBatches
from cllm.training.parallel.shards import Shard


def packed(batches: MicroBatches, shards: list[Shard]) -> Tensor:
    """(2, shards, rows, T) int64 on the CPU: the ids and targets of some shards."""
    pairs = [[side[s.first : s.last] for side in batches[s.micro]] for s in shards]
    return torch.stack([torch.stack([pair[i] for pair in pairs]) for i in range(2)]).cpu()


def padded(ids_bt: Tensor, targets_bt: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The same with rows that no loss counts, up to ``rows``."""
    missing = rows - ids_bt.shape[0]
    assert missing >= 0
    return (
        torch.cat([ids_bt, ids_bt.new_zeros(missing, ids_bt.shape[1])]),
        torch.cat([targets_bt, targets_bt.new_full((missing, ids_bt.shape[1]), IGNORED)]),
    )


def evaluation_parts(ids_bt: Tensor, targets_bt: Tensor, processes: int) -> list[Tensor]:
    """A batch to score in equal parts, (2, 1, rows, T) each."""
    rows = -(-ids_bt.shape[0] // processes)
    pair = padded(ids_bt, targets_bt, rows * processes)
    parts = zip(*(side.split(rows) for side in pair), strict=True)
    return [torch.stack(part)[:, None].cpu() for part in parts]

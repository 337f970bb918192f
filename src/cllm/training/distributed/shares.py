"""Which windows of a step each process takes: equal shares, so that all take part in every exchange."""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

from cllm.text.batches import IGNORED
from cllm.training.feed import MicroBatches
from cllm.training.parallel.shards import Shard


def deal_evenly(batch_size: int, accumulate: int, processes: int) -> list[list[Shard]]:
    """The shards of each process; together all windows of a step, in order.

    Each process has as many windows, in as few shards of as many rows each as keep to one micro-batch.

    Raises:
        ValueError: the windows do not divide.
    """
    each, left = divmod(batch_size * accumulate, processes)
    if left or not each:
        raise ValueError(
            f"the {batch_size * accumulate} windows of a step (train.batch_size times train.accumulate) do "
            f"not divide into the {processes} processes of torchrun: make either a multiple of {processes}"
        )
    rows = gcd(batch_size, each)
    starts = range(0, batch_size * accumulate, rows)
    shards = [Shard(at // batch_size, at % batch_size, at % batch_size + rows) for at in starts]
    return [shards[n : n + each // rows] for n in range(0, len(shards), each // rows)]


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

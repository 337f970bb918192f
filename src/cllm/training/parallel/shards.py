"""Which windows of a step each worker, or process of torchrun, takes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import gcd


@dataclass(frozen=True)
class Shard:
    """Rows ``first:last`` of micro-batch ``micro``."""

    micro: int
    first: int
    last: int


def deal_evenly(
    batch_size: int, accumulate: int, count: int, who: str = "processes of torchrun"
) -> list[list[Shard]]:
    """The shards of each of ``count``; together all windows of a step, in order.

    Each has as many windows, in as few shards of as many rows each as keep to one micro-batch.

    Raises:
        ValueError: the windows do not divide.
    """
    windows = batch_size * accumulate
    each, left = divmod(windows, count)
    if left or not each:
        raise ValueError(
            f"the {windows} windows of a step (train.batch_size times train.accumulate) do not divide into "
            f"{count} {who}: make either a multiple of {count}"
        )
    rows = gcd(batch_size, each)
    shards = [
        Shard(at // batch_size, at % batch_size, at % batch_size + rows)
        for at in range(0, windows, rows)
    ]
    return [shards[n : n + each // rows] for n in range(0, len(shards), each // rows)]


def deal(batch_size: int, accumulate: int, workers: int) -> list[list[Shard]]:
    """The shards of each worker; together all windows of a step, in order.

    Evenly where the windows divide, else whole micro-batches, of which some workers have one more than
    others.

    Raises:
        ValueError: the windows do not divide, and there are fewer micro-batches than workers.
    """
    try:
        return deal_evenly(batch_size, accumulate, workers, "workers (train.parallel.workers)")
    except ValueError:
        if accumulate < workers:
            raise
    ends = [accumulate * share // workers for share in range(workers + 1)]
    return [
        [Shard(micro, 0, batch_size) for micro in range(begin, end)]
        for begin, end in pairwise(ends)
    ]


def most_workers(batch_size: int, accumulate: int, cores: int) -> int:
    """The largest number of workers, at most ``cores``, that the windows of a step can be dealt to."""
    return next(
        count
        for count in range(cores, 0, -1)
        if accumulate >= count or batch_size * accumulate % count == 0
    )

"""Which windows of a step each worker takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shard:
    """Rows ``first:last`` of micro-batch ``micro``."""

    micro: int
    first: int
    last: int


def deal(batch_size: int, accumulate: int, workers: int) -> list[list[Shard]]:
    """The shards of each worker; together all windows of a step, in order.

    Whole micro-batches where there are as many as workers (some workers then have one more than others),
    else each micro-batch in ``workers`` equal parts.

    Raises:
        ValueError: fewer micro-batches than workers, and windows that do not divide.
    """
    if accumulate >= workers:
        ends = [accumulate * (worker + 1) // workers for worker in range(workers)]
        begins = [0, *ends[:-1]]
        return [
            [Shard(micro, 0, batch_size) for micro in range(begin, end)]
            for begin, end in zip(begins, ends, strict=True)
        ]
    if batch_size % workers:
        raise ValueError(
            f"train.batch_size = {batch_size} does not divide into train.parallel.workers = {workers}: "
            f"make it a multiple of {workers}, or train.accumulate at least {workers}"
        )
    part = batch_size // workers
    return [
        [Shard(micro, worker * part, (worker + 1) * part) for micro in range(accumulate)]
        for worker in range(workers)
    ]

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

    Whole micro-batches where they divide evenly, else each micro-batch in ``workers`` equal parts. Where
    neither divides, whole micro-batches, of which some workers have one more than others.

    Raises:
        ValueError: neither divides, and there are fewer micro-batches than workers.
    """
    parts_divide = batch_size % workers == 0
    if accumulate % workers == 0 or (accumulate > workers and not parts_divide):
        return whole_ones(batch_size, accumulate, workers)
    if not parts_divide:
        raise ValueError(
            f"train.batch_size = {batch_size} does not divide into train.parallel.workers = {workers}: "
            f"make it a multiple of {workers}, or train.accumulate at least {workers}"
        )
    return equal_parts(batch_size, accumulate, workers)


def most_workers(batch_size: int, accumulate: int, cores: int) -> int:
    """The largest number of workers, at most ``cores``, that the windows of a step can be dealt to."""
    return next(
        count for count in range(cores, 0, -1) if accumulate >= count or batch_size % count == 0
    )


def whole_ones(batch_size: int, accumulate: int, shares: int) -> list[list[Shard]]:
    """Whole micro-batches, one more for some where they do not divide."""
    ends = [accumulate * (share + 1) // shares for share in range(shares)]
    return [
        [Shard(micro, 0, batch_size) for micro in range(begin, end)]
        for begin, end in zip([0, *ends[:-1]], ends, strict=True)
    ]


def equal_parts(batch_size: int, accumulate: int, shares: int) -> list[list[Shard]]:
    """Each micro-batch in equal parts; ``batch_size`` must be a multiple of ``shares``."""
    assert batch_size % shares == 0
    part = batch_size // shares
    return [
        [Shard(micro, share * part, (share + 1) * part) for micro in range(accumulate)]
        for share in range(shares)
    ]

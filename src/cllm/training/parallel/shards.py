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
        return whole_ones(batch_size, accumulate, workers)
    if batch_size % workers:
        raise ValueError(
            f"train.batch_size = {batch_size} does not divide into train.parallel.workers = {workers}: "
            f"make it a multiple of {workers}, or train.accumulate at least {workers}"
        )
    return equal_parts(batch_size, accumulate, workers)


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

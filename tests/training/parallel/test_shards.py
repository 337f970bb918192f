"""Shards hold every window of a step once, in order, and refuse what does not divide."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm.training.parallel.shards import Shard, deal, most_workers

small = st.integers(1, 9)


@given(small, small, small)
def test_all_windows_are_dealt_in_order(size: int, accumulate: int, workers: int) -> None:
    if workers > accumulate and size * accumulate % workers:
        with pytest.raises(ValueError, match=r"windows of a step .* do not divide into"):
            deal(size, accumulate, workers)
        return
    shares = deal(size, accumulate, workers)
    assert len(shares) == workers
    windows = [(s.micro, row) for share in shares for s in share for row in range(s.first, s.last)]
    assert windows == [(m, row) for m in range(accumulate) for row in range(size)]
    loads = [sum(s.last - s.first for s in share) for share in shares]
    assert max(loads) - min(loads) == (size if size * accumulate % workers else 0)
    if accumulate % workers == 0:
        assert all(s.last - s.first == size for share in shares for s in share)


def test_shares_are_cut_as_little_as_can_be() -> None:
    """Three micro-batches of 16 windows are no two and one for two workers: these would wait. Half of one
    of four is one pass, not a part of each of the four."""
    assert [sum(s.last - s.first for s in share) for share in deal(16, 3, 2)] == [24, 24]
    assert deal(16, 4, 8)[:3] == [[Shard(0, 0, 8)], [Shard(0, 8, 16)], [Shard(1, 0, 8)]]


@given(small, small, small)
def test_the_most_workers_are_as_many_as_can_be_dealt_to(
    size: int, accumulate: int, cores: int
) -> None:
    most = most_workers(size, accumulate, cores)
    assert len(deal(size, accumulate, most)) == most <= cores
    for count in range(most + 1, cores + 1):
        with pytest.raises(ValueError, match="do not divide"):
            deal(size, accumulate, count)
    assert [most_workers(16, 1, cores) for cores in (1, 2, 6, 10, 12, 16)] == [1, 2, 4, 8, 8, 16]

"""Shards hold every window of a step once, in order, and refuse what does not divide."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm.training.parallel.shards import deal, most_workers

small = st.integers(1, 9)


@given(small, small, small)
def test_all_windows_are_dealt(part: int, accumulate: int, workers: int) -> None:
    size = part * workers
    shares = deal(size, accumulate, workers)
    assert len(shares) == workers
    windows = [(s.micro, row) for share in shares for s in share for row in range(s.first, s.last)]
    assert sorted(windows) == [(m, row) for m in range(accumulate) for row in range(size)]
    loads = [sum(s.last - s.first for s in share) for share in shares]
    assert max(loads) == min(loads)
    if accumulate % workers == 0:  # whole micro-batches, in order
        assert windows == sorted(windows)
        assert all(s.last - s.first == size for share in shares for s in share)


@given(small, small, small)
def test_what_divides_unevenly_is_dealt_as_evenly_as_it_can_be(
    size: int, accumulate: int, workers: int
) -> None:
    """Three micro-batches of 16 windows are no two and one for two workers: these would wait."""
    assert [sum(s.last - s.first for s in share) for share in deal(16, 3, 2)] == [24, 24]
    if workers > accumulate and size % workers:
        return
    shares = deal(size, accumulate, workers)
    windows = [(s.micro, row) for share in shares for s in share for row in range(s.first, s.last)]
    assert sorted(windows) == [(m, row) for m in range(accumulate) for row in range(size)]
    loads = [sum(s.last - s.first for s in share) for share in shares]
    divides = accumulate % workers == 0 or size % workers == 0
    assert max(loads) - min(loads) == (0 if divides else size)


@given(small, small, small)
def test_the_most_workers_are_as_many_as_can_be_dealt_to(
    size: int, accumulate: int, cores: int
) -> None:
    most = most_workers(size, accumulate, cores)
    assert len(deal(size, accumulate, most)) == most <= cores
    for count in range(most + 1, cores + 1):
        with pytest.raises(ValueError, match="does not divide"):
            deal(size, accumulate, count)
    assert [most_workers(16, 1, cores) for cores in (1, 2, 6, 10, 12, 16)] == [1, 2, 4, 8, 8, 16]


@given(small, small)
def test_what_does_not_divide_is_refused(part: int, accumulate: int) -> None:
    with pytest.raises(ValueError, match=r"train\.batch_size = .* does not divide"):
        deal(part * (accumulate + 1) + 1, accumulate, accumulate + 1)

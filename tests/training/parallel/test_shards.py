"""Shards hold every window of a step once, in order, and refuse what does not divide."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm.training.parallel.shards import deal

small = st.integers(1, 9)


@given(small, small, small)
def test_all_windows_are_dealt(part: int, accumulate: int, workers: int) -> None:
    size = part * workers
    shares = deal(size, accumulate, workers)
    assert len(shares) == workers
    windows = [(s.micro, row) for share in shares for s in share for row in range(s.first, s.last)]
    assert sorted(windows) == [(m, row) for m in range(accumulate) for row in range(size)]
    loads = [sum(s.last - s.first for s in share) for share in shares]
    assert max(loads) - min(loads) <= size * (accumulate >= workers)
    if accumulate >= workers:  # whole micro-batches, in order
        assert windows == sorted(windows)
        assert all(s.last - s.first == size for share in shares for s in share)


@given(small, small)
def test_what_does_not_divide_is_refused(part: int, accumulate: int) -> None:
    with pytest.raises(ValueError, match=r"train\.batch_size = .* does not divide"):
        deal(part * (accumulate + 1) + 1, accumulate, accumulate + 1)

"""Batches: a permutation of windows for each epoch, every evaluation target exactly once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.core.errors import UserError
from cllm.text.batches import IGNORED, BatchSource, evaluation_batches, evaluation_windows
from cllm.text.packed import PackedTokens
from cllm.text.permutation import permute

Stream = Callable[..., PackedTokens]


@given(st.integers(1, 5000), st.integers(0, 2**63 - 1), st.integers(0, 10))
@settings(deadline=None)
def test_permutation_is_one(n: int, seed: int, epoch: int) -> None:
    images = permute(np.arange(n), n, seed, epoch)
    assert sorted(images.tolist()) == list(range(n))
    some = np.arange(0, n, 3)
    np.testing.assert_array_equal(permute(some, n, seed, epoch), images[some])


def test_permutation_does_not_change_between_versions() -> None:
    assert permute(np.arange(10), 10, 0, 0).tolist() == PINNED_SMALL
    assert permute(np.arange(3), 10**12, 5, 2).tolist() == PINNED_LARGE


PINNED_SMALL = [2, 0, 5, 4, 9, 7, 6, 8, 3, 1]
PINNED_LARGE = [561191502040, 63822167050, 759149472413]


def test_permutation_looks_random() -> None:
    n, seeds = 64, 600
    first = np.array([permute(np.arange(4), n, seed, 0) for seed in range(seeds)])
    for column in first.T:
        counts = np.bincount(column // 8, minlength=8)
        chi2 = ((counts - seeds / 8) ** 2 / (seeds / 8)).sum()
        assert chi2 < 24.3  # 7 degrees of freedom, p = 0.001
    large = permute(np.arange(5000), 100_000, 1, 0)
    assert abs(np.corrcoef(np.arange(5000), large)[0, 1]) < 0.05
    assert abs(np.corrcoef(large[:-1], large[1:])[0, 1]) < 0.05


@given(st.integers(8, 300), st.integers(1, 8), st.integers(1, 7), st.integers(0, 5))
@settings(deadline=None)
def test_an_epoch_shows_each_token_at_most_once(
    stream: Stream, tokens: int, context: int, batch: int, seed: int
) -> None:
    source = BatchSource(stream(tokens), context, batch, seed)
    windows = source.windows_per_epoch
    assert windows == (tokens + 1) // context
    batches = [source.batch(i) for i in range(-(-3 * windows // batch))]
    inputs = np.concatenate([x for x, _ in batches])
    targets = np.concatenate([y for _, y in batches])
    assert inputs.dtype == targets.dtype == np.int64
    np.testing.assert_array_equal(targets, (inputs + 1) % (tokens + 1))
    for epoch in range(3):
        shown = Counter(targets[epoch * windows : (epoch + 1) * windows].ravel().tolist())
        assert set(shown.values()) == {1}
        assert len(shown) == windows * context


def test_order_depends_on_seed_epoch_and_index_alone(stream: Stream) -> None:
    source = BatchSource(stream(5000), 16, 4, 3)
    late = source.batch(1000)
    for index in (5, 0, 999):
        source.batch(index)
    np.testing.assert_array_equal(BatchSource(stream(5000), 16, 4, 3).batch(1000), late)
    other = BatchSource(stream(5000), 16, 4, 4).batch(1000)
    assert (other[0] != late[0]).any()


def test_batches_are_a_cut_of_one_sequence(stream: Stream) -> None:
    """Two micro-batches of 4 hold the windows of one of 8, so 1×8 = 2×4."""
    large, small = (BatchSource(stream(997), 8, size, 1) for size in (8, 4))
    for index in range(40):
        halves = [small.batch(2 * index)[0], small.batch(2 * index + 1)[0]]
        np.testing.assert_array_equal(np.concatenate(halves), large.batch(index)[0])


def test_the_grid_moves_between_epochs(stream: Stream) -> None:
    source = BatchSource(stream(1000), 10, 100, 0)
    grids = {int(source.starts(epoch).min()) % 10 for epoch in range(12)}
    assert len(grids) > 3
    assert source.epoch(2) == 2.0


def test_one_window_and_a_batch_that_spans_epochs(stream: Stream) -> None:
    source = BatchSource(stream(9), 10, 5, 0)
    assert source.windows_per_epoch == 1
    inputs, targets = source.batch(0)
    assert inputs.shape == targets.shape == (5, 10)
    assert all(sorted(row) == list(range(10)) for row in targets.tolist())


def test_too_short(stream: Stream) -> None:
    with pytest.raises(UserError, match="9 tokens, fewer than one context of 10"):
        BatchSource(stream(8), 10, 1, 0)


def test_masked_targets(stream: Stream) -> None:
    mask = np.zeros(102, dtype=bool)
    mask[30:50] = True
    mask[101] = True  # the closing end token, which stands where the circle begins
    source = BatchSource(stream(100, mask), 101, 2, 0)
    for inputs, targets in (source.batch(i) for i in range(5)):
        for row, target in zip(inputs, targets, strict=True):
            counted = target != IGNORED
            np.testing.assert_array_equal(target[counted], (row[counted] + 1) % 101)
            assert set(target[counted].tolist()) == {*range(30, 50), 0}


@given(st.integers(1, 200), st.integers(1, 17), st.integers(1, 5), st.booleans())
@settings(deadline=None)
def test_evaluation_scores_each_target_once(
    stream: Stream, tokens: int, context: int, batch: int, masked: bool
) -> None:
    mask = np.arange(tokens + 2) % 3 == 1 if masked else None
    packed = stream(tokens, mask)
    windows = list(evaluation_windows(packed, context, batch))
    assert len(windows) == evaluation_batches(packed, context, batch)
    assert {part.shape for pair in windows for part in pair} == {(batch, context)}
    inputs = np.concatenate([x.ravel() for x, _ in windows])
    targets = np.concatenate([y.ravel() for _, y in windows])
    counted = targets != IGNORED
    ids = packed.ids.astype(np.int64)
    expected = np.arange(1, tokens + 2) if mask is None else np.flatnonzero(mask[1:]) + 1
    np.testing.assert_array_equal(targets[counted], ids[expected])
    np.testing.assert_array_equal(inputs[counted], ids[expected - 1])
    assert counted.sum() == packed.scored_tokens

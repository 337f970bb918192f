"""Candidates of sampled softmax: their chances, that these are kept, and that draws repeat."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.text.batches import IGNORED
from cllm.training.candidates import expectations, log_uniform, stratified, unigram
from cllm.training.draws import Draws

WEIGHTS = st.lists(st.floats(1e-6, 1e3), min_size=2, max_size=40)


@settings(max_examples=60, deadline=None)
@given(WEIGHTS, st.integers(1, 39))
def test_expectations_sum_to_the_size_and_none_is_above_one(
    weights: list[float], size: int
) -> None:
    size = min(size, len(weights) - 1)
    expected, certain = expectations(np.array(weights), size)
    assert expected.sum() == pytest.approx(size)
    assert (expected <= 1).all()
    assert (expected[certain] == 1).all()
    free = np.flatnonzero(~certain)
    ratio = expected[free] / np.array(weights)[free]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-9)


@settings(max_examples=60, deadline=None)
@given(WEIGHTS, st.integers(1, 39), st.integers(0, 2**60))
def test_a_draw_has_its_size_and_only_tokens_there_are(
    weights: list[float], size: int, key: int
) -> None:
    size = min(size, len(weights) - 1)
    ids, expected = stratified(np.array(weights), size, key)
    assert len(ids) == len(expected) == size
    assert ids.min() >= 0
    assert ids.max() < len(weights)
    assert np.array_equal(expected, expectations(np.array(weights), size)[0][ids])


def test_tokens_come_as_often_as_they_are_expected() -> None:
    weights = unigram(np.array([1000, 300, 100, 50, 20, 5, 3, 1, 0, 0, 0, 0]))
    expected, certain = expectations(weights, 5)
    assert 0 < certain.sum() < 5
    draws = 6000
    counts = sum(
        np.bincount(stratified(weights, 5, key)[0], minlength=len(weights)) for key in range(draws)
    )
    np.testing.assert_allclose(counts / draws, expected, atol=4 * 0.5 / np.sqrt(draws))


@pytest.mark.parametrize("of", [unigram, log_uniform])
def test_chances_fall_with_frequency_and_are_never_none(of: Callable) -> None:
    counts = np.array([0, 50, 7, 7, 0, 900])
    chances = of(counts)
    assert (chances > 0).all()
    assert chances.sum() == pytest.approx(1)
    order = np.argsort(-counts, kind="stable")
    assert (np.diff(chances[order]) <= 0).all()
    assert chances[5] == chances.max()


def test_a_draw_is_a_function_of_seed_and_number(draws_of: Callable[..., Draws]) -> None:
    targets = np.arange(10)
    drawn = {}
    for seed in (1, 2):
        for number in (5, 6):
            sampler = draws_of(candidates=6, seed=seed).sampler
            assert sampler is not None
            first, again = sampler.draw(number, targets), sampler.draw(number, targets)
            assert np.array_equal(first[0], again[0])
            drawn[seed, number] = tuple(first[0].tolist())
    assert len(set(drawn.values())) == 4


def test_the_divisor_sampler_draws_the_targets_neighbours(draws_of: Callable[..., Draws]) -> None:
    plain, near = draws_of(candidates=6).sampler, draws_of(candidates=6, divisor=True).sampler
    assert plain is not None
    assert near is not None
    assert near.neighbours is not None
    targets = np.array([2, 2, 7, IGNORED])
    wanted = set(near.neighbours.ids[[2, 7]].ravel().tolist())

    def share(sampler) -> float:
        ids = np.concatenate([sampler.draw(number, targets)[0] for number in range(200)])
        return float(np.isin(ids, list(wanted)).mean())

    assert share(near) > share(plain) + 0.1
    ids, expected = near.draw(0, targets)
    weights = 0.5 * near.probabilities
    given = near.neighbours.spread(np.bincount([2, 2, 7], minlength=23))
    weights += 0.5 * given / given.sum()
    np.testing.assert_allclose(expected, expectations(weights, 6)[0][ids])


def test_without_targets_or_neighbours_it_draws_by_frequency(
    draws_of: Callable[..., Draws],
) -> None:
    plain, near = draws_of(candidates=6).sampler, draws_of(candidates=6, divisor=True).sampler
    assert plain is not None
    assert near is not None
    for targets in (np.array([IGNORED]), np.array([22, 22])):  # token 22 has no neighbours
        assert np.array_equal(near.draw(4, targets)[0], plain.draw(4, targets)[0])

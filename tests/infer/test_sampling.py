"""How a token is drawn, as properties over any logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cllm.core.errors import UsageError
from cllm.infer.sampling import Sampling, choose_token

LOGITS = st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=12).map(torch.tensor)


def draw(logits: Tensor, seed: int = 0, count: int = 1, **settings: float) -> list[int]:
    """Tokens drawn one after the other."""
    sampling = Sampling(**{"top_k": 0, "temperature": 1.0} | settings)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    return [choose_token(logits, sampling, generator) for _ in range(count)]


@given(LOGITS, st.integers(0, 1000))
def test_greedy_takes_the_likeliest_whatever_the_seed(logits: Tensor, seed: int) -> None:
    (token,) = draw(logits, seed, temperature=0.0)
    assert logits[token] == logits.max()


@given(LOGITS, st.integers(0, 1000), st.integers(1, 15), st.floats(0.05, 5.0))
def test_top_k_draws_one_of_the_k_likeliest(
    logits: Tensor, seed: int, k: int, temperature: float
) -> None:
    (token,) = draw(logits, seed, top_k=k, temperature=temperature)
    assert int((logits > logits[token]).sum()) < k


@given(LOGITS, st.integers(0, 1000), st.floats(0.01, 1.0))
def test_top_p_draws_from_the_fewest_that_reach_p(logits: Tensor, seed: int, p: float) -> None:
    (token,) = draw(logits, seed, top_p=p)
    probabilities = torch.softmax(logits.double(), 0)
    likelier = probabilities[probabilities > probabilities[token]].sum()
    assert likelier < p + 1e-12


@given(LOGITS, st.integers(0, 2**63 - 1))
@settings(max_examples=30)
def test_the_same_seed_draws_the_same(logits: Tensor, seed: int) -> None:
    assert draw(logits, seed, count=20) == draw(logits, seed, count=20)


@given(LOGITS, st.floats(-30, 30, width=32))
@settings(max_examples=30)
def test_a_constant_added_to_all_logits_changes_nothing(logits: Tensor, shift: float) -> None:
    whole = logits.round()  # exact in float64, so that rounding cannot tip a draw
    shifted = whole.double() + round(shift)
    assert draw(whole, 3, count=10) == draw(shifted, 3, count=10)


def test_the_draws_have_the_probabilities_of_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    for temperature in (0.5, 1.0, 2.0):
        drawn = torch.tensor(draw(logits, 1, count=4000, temperature=temperature))
        found = torch.bincount(drawn, minlength=4) / 4000
        expected = torch.softmax(logits / temperature, 0)
        assert (found - expected).abs().max() < 0.03


def test_the_lowest_temperature_takes_the_likeliest() -> None:
    logits = torch.tensor([3.0, 5.0, -40.0, float("-inf")])
    for kept in ({}, {"top_k": 2}, {"top_k": 0, "top_p": 0.5}, {"top_k": 0, "min_p": 0.1}):
        for temperature in (5e-324, 1e-300):
            assert set(draw(logits, count=20, temperature=temperature, **kept)) == {1}


def test_top_p_keeps_what_its_definition_says() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    for p, kept in ((0.4, {0}), (0.5, {0}), (0.51, {0, 1}), (0.9, {0, 1, 2}), (1.0, {0, 1, 2, 3})):
        assert set(draw(logits.double(), count=400, top_p=p)) == kept


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Sampling(**wrong)  # type: ignore[arg-type]

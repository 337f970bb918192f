"""Learning rates at the corner points of every schedule."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from cllm.core.config import TrainConfig
from cllm.training.schedule import learning_rate

KINDS = ["constant", "linear", "cosine", "wsd", "step"]


def rates(schedule: str, **fields: Any) -> list[float]:
    """The rate of each step; 101 steps of peak 1.0 unless told."""
    config = TrainConfig(**{"steps": 101, "lr": 1.0, "schedule": schedule, "warmup": 0} | fields)
    return [learning_rate(config, step) for step in range(config.steps)]


@pytest.mark.parametrize("schedule", KINDS)
def test_warm_up_rises_in_equal_parts_to_the_full_rate(schedule: str) -> None:
    found = rates(schedule, warmup=10, lr=0.5, steps=200)
    assert found[:10] == pytest.approx([0.05 * i for i in range(1, 11)])
    assert found[10] == pytest.approx(0.5)


@pytest.mark.parametrize("schedule", KINDS)
def test_after_the_warm_up_it_never_rises_and_stays_above_the_minimum(schedule: str) -> None:
    found = rates(schedule, warmup=7)
    assert all(a >= b for a, b in pairwise(found[7:]))
    assert min(found[7:]) >= 0.1 - 1e-12


def test_constant() -> None:
    assert set(rates("constant")) == {1.0}


def test_linear() -> None:
    found = rates("linear", min_lr=0.2)
    assert [found[i] for i in (0, 50, 100)] == pytest.approx([1.0, 0.6, 0.2])


def test_cosine() -> None:
    found = rates("cosine", min_lr=0.2)
    quarter = 0.2 + 0.8 * 0.5 * (1 + 2**-0.5)
    assert [found[i] for i in (0, 25, 50, 100)] == pytest.approx([1.0, quarter, 0.6, 0.2])


def test_warmup_stable_decay() -> None:
    found = rates("wsd", min_lr=0.0, decay_share=0.2)
    assert found[:81] == pytest.approx([1.0] * 81)
    assert [found[i] for i in (81, 90, 100)] == pytest.approx([0.95, 0.5, 0.0])


def test_step() -> None:
    found = rates("step", steps=100, step_every=0.3, step_factor=0.3, min_lr=0.05)
    expected = [1.0, 1.0, 0.3, 0.3, 0.09, 0.09, 0.05, 0.05]
    assert [found[i] for i in (0, 29, 30, 59, 60, 89, 90, 99)] == pytest.approx(expected)


@pytest.mark.parametrize("schedule", KINDS)
def test_the_shortest_runs_have_rates(schedule: str) -> None:
    assert len(rates(schedule, steps=1)) == 1
    assert all(0 < rate <= 1 for rate in rates(schedule, steps=2, warmup=1))
    assert rates(schedule, steps=3, warmup=2)[:2] == pytest.approx([0.5, 1.0])


def test_the_warm_up_by_itself_is_a_twentieth_and_at_most_200() -> None:
    found = [TrainConfig(steps=steps).warmup_steps for steps in (1, 19, 20, 600, 4000, 10**6)]
    assert found == [0, 0, 1, 30, 200, 200]
    assert TrainConfig(steps=100, warmup=0).warmup_steps == 0

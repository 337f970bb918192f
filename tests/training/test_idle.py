"""What idle weights miss, against the optimizers themselves with gradients of zero."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.core.config import TrainConfig
from cllm.training.arena import Part
from cllm.training.idle import IdleClock
from cllm.training.optimizer import OPTIMIZERS


@pytest.mark.parametrize("name", list(OPTIMIZERS))
@settings(max_examples=25, deadline=None)
@given(
    busy=st.integers(0, 4),
    idle=st.integers(0, 60),
    decay=st.sampled_from([0.0, 0.5]),
    first=st.sampled_from([0.0, 0.5, 0.9]),
)
def test_the_closed_form_is_what_the_optimizer_does(
    name: str, busy: int, idle: int, decay: float, first: float
) -> None:
    config = TrainConfig(
        optimizer=name, weight_decay=decay, betas=(first, 0.95), momentum=first, eps=1e-14
    )
    rule = OPTIMIZERS[name](config)
    generator = torch.Generator().manual_seed(busy + 100 * idle)

    def random() -> torch.Tensor:
        return torch.randn(3, 4, generator=generator, dtype=torch.float64)

    part = Part(
        weights=random(),
        moments={moment: torch.zeros(3, 4, dtype=torch.float64) for moment in rule.moments},
    )
    clock = IdleClock(rule)
    for step in range(busy + idle):
        if step == busy:
            kept = part.weights.clone(), {m: t.clone() for m, t in part.moments.items()}
        lr = 0.05 / (1 + step % 7)
        grad = random() if step < busy else torch.zeros(3, 4, dtype=torch.float64)
        rule.update(part, grad, 1.0, lr, step + 1)
        clock.advance(lr)
    if not idle:
        kept = part.weights, part.moments
    weights, moments = clock.catch_up(*kept, torch.full((3,), busy))
    torch.testing.assert_close(weights, part.weights, rtol=1e-9, atol=1e-11)
    for moment, value in moments.items():
        torch.testing.assert_close(value, part.moments[moment], rtol=1e-9, atol=1e-14)
    if not idle:
        assert torch.equal(weights, part.weights)


def test_its_state_is_all_of_it() -> None:
    rule = OPTIMIZERS["adamw"](TrainConfig())
    clock, other = IdleClock(rule), IdleClock(rule)
    for step in range(5):
        clock.advance(0.1 / (step + 1))
    other.load(clock.state())
    for each in (clock, other):
        each.advance(0.02)
    rows = torch.randn(6, 2, generator=torch.Generator().manual_seed(1))
    moments = {"mean": rows * 2, "square": rows.abs()}
    for one, two in zip(
        clock.catch_up(rows, moments, torch.arange(6)),
        other.catch_up(rows, moments, torch.arange(6)),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=0, atol=0)
    assert not torch.equal(clock.catch_up(rows, moments, torch.arange(6))[0][0], rows[0])

"""The delayed pipeline is the recurrence that it says it is, to the bit, whatever its threads do."""

from __future__ import annotations

import random
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cllm.core.machine import cannot_compile
from cllm.training.feed import MicroBatches, target_count
from cllm.training.figures import StepResult
from cllm.training.gradient import Micro
from cllm.training.pipeline.delayed import Delayed
from cllm.training.pipeline.halves import Halves
from cllm.training.step import TrainStep

Steps = Callable[..., TrainStep]
Batches = Callable[..., MicroBatches]

PATIENCE = 60.0
"""Seconds after which a test that hangs has failed."""


def rate(number: int) -> float:
    """A learning rate that changes."""
    return 0.02 / (1 + number % 5)


def pipelined(
    step: TrainStep,
    feed: Callable[[int], MicroBatches],
    steps: int,
    *,
    delay: int,
    segment: int = 0,
    pause: Callable[[str], None] | None = None,
    seeds: bool = False,
    patience: float = PATIENCE,
) -> list[StepResult]:
    """``steps`` steps, drained after each ``segment`` of them; fails where a watchdog runs out."""
    found: list[StepResult] = []
    errors: list[BaseException] = []

    def run() -> None:
        delayed = Delayed(step, delay=delay, pause=pause)
        try:
            given = 0
            while len(found) < steps:
                end = min(steps, (len(found) // segment + 1) * segment) if segment else steps
                while given < end and delayed.in_flight <= delay:
                    delayed.submit(feed(given), rate(given), given if seeds else None)
                    given += 1
                found.append(delayed.result())
                if not delayed.in_flight:
                    delayed.settle()
        except BaseException as error:
            errors.append(error)
        finally:
            delayed.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(patience)
    assert not thread.is_alive(), "the pipeline hangs"
    if errors:
        raise errors[0]
    return found


def simulated(
    step: TrainStep,
    feed: Callable[[int], MicroBatches],
    steps: int,
    *,
    delay: int,
    segment: int = 0,
    compiled: bool = False,
) -> list[float]:
    """The recurrence on one thread, with the plain loop's gradient (``compiled``: the compiled halves')
    and a list of past weights."""
    arena, update = step.arena, step.update
    halves = Halves(step.gradients, compiled=True) if compiled else None
    past = [arena.weights.clone()]
    losses, applied = [], 0
    for number in range(steps):
        if segment and number % segment == 0:
            past = past[-1:]
        now = past[-1]
        arena.compute.copy_(past[max(len(past) - 1 - delay, 0)])
        batches = feed(number)
        arena.grad.zero_()
        loss, scale = 0.0, torch.full_like(step._scale, 1.0 / target_count(batches))
        for place, pair in enumerate(batches):
            if halves is not None:
                held = halves.forward(arena.compute.clone(), Micro(*pair), scale)
                halves.backward(held, arena.grad, first=place == 0)
                loss += float(held.loss)
            else:
                found = step.gradients.backward(Micro(*pair), scale, {})
                arena.grad.add_(found.flat)
                loss += float(found.loss)
        losses.append(loss / target_count(batches))
        if arena.compute is arena.weights:
            arena.weights.copy_(now)
        norm = update.norm(arena.grad)
        if torch.isfinite(torch.tensor([norm, loss])).all():
            applied += 1
            update.apply(arena.grad, norm, 1.0, rate(number), applied)
        past.append(arena.weights.clone())
    return losses


def assert_same(one: TrainStep, other: TrainStep) -> None:
    """Weights and moments to the bit."""
    assert torch.equal(one.arena.weights, other.arena.weights)
    for name, moment in one.arena.moments.items():
        assert torch.equal(moment, other.arena.moments[name])


@pytest.mark.parametrize(
    ("delay", "dtype", "fields", "accumulate"),
    [
        (2, torch.float32, {"n_layers": 1}, 1),
        (2, torch.bfloat16, {"n_layers": 1, "tie_embeddings": False}, 2),
        (1, torch.float64, {"n_layers": 1, "embedding": {"kind": "reduced", "rank": 8}}, 1),
    ],
)
def test_it_is_the_simulated_recurrence_over_200_steps(
    delay: int,
    dtype: torch.dtype,
    fields: dict[str, Any],
    accumulate: int,
    step_of: Steps,
    batches_of: Batches,
) -> None:
    ours, reference = step_of(dtype=dtype, **fields), step_of(dtype=dtype, **fields)
    start = ours.arena.weights.clone()

    def feed(number: int) -> MicroBatches:
        return batches_of(accumulate, seed=number, masked=0.3)

    results = pipelined(ours, feed, 200, delay=delay, segment=70)
    losses = simulated(reference, feed, 200, delay=delay, segment=70)
    assert all(result.applied for result in results)
    assert_same(ours, reference)
    assert [result.loss for result in results] == pytest.approx(losses, rel=1e-6)
    assert not torch.equal(ours.arena.weights, start)
    assert int(ours.counters["applied"]) == 200


def test_another_delay_is_another_recurrence(step_of: Steps, batches_of: Batches) -> None:
    ours, reference = step_of(), step_of()
    pipelined(ours, lambda n: batches_of(seed=n), 10, delay=2)
    simulated(reference, lambda n: batches_of(seed=n), 10, delay=1)
    assert not torch.equal(ours.arena.weights, reference.arena.weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_delay_it_is_the_plain_loop(
    dtype: torch.dtype, step_of: Steps, batches_of: Batches
) -> None:
    dropout = {"residual_dropout": 0.2, "n_layers": 1}
    ours, plain = step_of(dtype=dtype, **dropout), step_of(dtype=dtype, **dropout)
    results = pipelined(ours, lambda n: batches_of(seed=n), 200, delay=0, seeds=True)
    for number, result in enumerate(results):
        torch.manual_seed(number)
        assert plain(batches_of(seed=number), rate(number)) == result
    assert_same(ours, plain)
    assert torch.equal(ours.arena.compute, plain.arena.compute)


@pytest.mark.parametrize("seed", range(4))
def test_random_delays_at_every_hand_over_change_no_bit(
    seed: int, step_of: Steps, batches_of: Batches
) -> None:
    places: set[str] = set()
    chance = random.Random(seed)

    def pause(where: str) -> None:
        places.add(where)
        if chance.random() < 0.3:
            time.sleep(chance.random() * 4e-3)

    ours, reference = step_of(dtype=torch.float32), step_of(dtype=torch.float32)
    pipelined(ours, lambda n: batches_of(seed=n), 25, delay=2, segment=11, pause=pause)
    simulated(reference, lambda n: batches_of(seed=n), 25, delay=2, segment=11)
    assert_same(ours, reference)
    handed = ("batch", "activations", "gradient", "free gradient", "result")
    expected = {f"{way} {what}" for way in ("put", "get") for what in handed}
    assert places == expected | {"take weights", "publish weights"}


@pytest.mark.slow
def test_compiled_stages_follow_the_recurrence_whatever_the_delays(
    step_of: Steps, batches_of: Batches, cache: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    if cannot_compile():
        pytest.skip(str(cannot_compile()))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", f"{cache}/inductor")
    chance, order = random.Random(7), list[str]()

    def pause(where: str) -> None:
        order.append(where)
        if chance.random() < 0.3:
            time.sleep(chance.random() * 4e-3)

    fields: dict[str, Any] = {"dtype": torch.float32, "n_layers": 1, "compiled": True}
    ours, reference = step_of(**fields), step_of(**fields)

    def feed(number: int) -> MicroBatches:
        return batches_of(2, seed=number)

    pipelined(ours, feed, 60, delay=2, segment=25, pause=pause, patience=500.0)
    simulated(reference, feed, 60, delay=2, segment=25, compiled=True)
    assert_same(ours, reference)
    # The first batch was alone: no other was read before its step was made.
    assert order.index("put result") < [n for n, w in enumerate(order) if w == "take weights"][1]


def test_a_step_that_is_not_finite_is_skipped_in_its_turn(
    step_of: Steps, batches_of: Batches
) -> None:
    ours, reference = step_of(dtype=torch.float32), step_of(dtype=torch.float32)
    for step in (ours, reference):
        damage(step, at=4)
    results = pipelined(ours, lambda n: batches_of(seed=n), 9, delay=2)
    simulated(reference, lambda n: batches_of(seed=n), 9, delay=2)
    assert [result.applied for result in results] == [n != 4 for n in range(9)]
    assert_same(ours, reference)
    assert (ours.counters["applied"], ours.counters["skipped"]) == (8, 1)


def damage(step: TrainStep, *, at: int) -> None:
    """The norm of the gradient of step ``at`` is not finite."""
    norm, calls = step.update.norm, iter(range(1000))
    step.update.norm = lambda grad: float("nan") if next(calls) == at else norm(grad)  # type: ignore[assignment]


@pytest.mark.parametrize("stage", ["forward", "backward", "optimizer"])
@pytest.mark.parametrize("at", [0, 5])
def test_a_failing_stage_ends_all_with_its_own_traceback(
    stage: str, at: int, step_of: Steps, batches_of: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(1000))

    def fails(call: Callable[..., Any]) -> Callable[..., Any]:
        def the_broken_stage(*args: Any, **names: Any) -> Any:
            if next(calls) == at:
                raise ZeroDivisionError("on purpose")
            return call(*args, **names)

        return the_broken_stage

    from cllm.training.update import Update

    owner, name = {
        "forward": (Halves, "forward"),
        "backward": (Halves, "backward"),
        "optimizer": (Update, "apply"),
    }[stage]
    monkeypatch.setattr(owner, name, fails(getattr(owner, name)))
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError, match="on purpose") as caught:
        pipelined(step_of(), lambda n: batches_of(seed=n), 20, delay=2)
    assert "the_broken_stage" in "".join(traceback.format_tb(caught.value.__traceback__))
    assert threading.active_count() == before


def test_it_closes_with_batches_on_their_way(step_of: Steps, batches_of: Batches) -> None:
    before = threading.active_count()
    delayed = Delayed(step_of())
    for number in range(3):
        delayed.submit(batches_of(seed=number), 0.01)
    delayed.close()
    assert threading.active_count() == before


def test_stages_overlap(step_of: Steps, batches_of: Batches) -> None:
    """The forward of batch 2 has begun before the optimizer has made its first step."""
    order: list[str] = []
    step = step_of()
    delayed = Delayed(step, pause=order.append)
    apply = step.update.apply

    def late(*args: Any) -> None:
        end = time.monotonic() + PATIENCE
        while order.count("take weights") < 3:
            assert time.monotonic() < end, "it waits for the optimizer"
            time.sleep(1e-3)
        apply(*args)

    step.update.apply = late  # type: ignore[method-assign]
    for number in range(3):
        delayed.submit(batches_of(seed=number), 0.01)
    assert delayed.result().applied
    delayed.close()

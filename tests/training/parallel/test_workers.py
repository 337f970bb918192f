"""Workers compute what one process computes, and end when one of them is gone: with real processes."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cllm.core.config import Config
from cllm.core.errors import UsageError
from cllm.core.machine import cannot_compile, machine
from cllm.text.batches import BatchSource
from cllm.text.packed import PackedTokens
from cllm.training import choose as choosing
from cllm.training.build import build
from cllm.training.choose import choose
from cllm.training.clipping import clip_factor
from cllm.training.feed import Feed, MicroBatches, target_count
from cllm.training.figures import Numbers, Summed
from cllm.training.gradient import Micro
from cllm.training.parallel.cores import cores_of_workers
from cllm.training.parallel.crew import WorkerError
from cllm.training.step import TrainStep

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs memfd")

BASE: dict[str, Any] = {
    "model__vocab_size": 300,
    "train__batch_size": 4,
    "train__dtype": "fp32",
    "train__attention": "matmul",
    "train__loss_chunk": 0,
    "train__lazy_rows": "off",
    "train__device": "cpu",
    "train__threads": 1,
}
ConfigOf = Callable[..., Config]


@pytest.fixture
def step_with(isolated: Path, config_of: ConfigOf) -> Iterator[Callable[..., TrainStep]]:
    """Makes a step of ``workers``, which end with the test."""
    made: list[TrainStep] = []

    def make(workers: int, **changes: Any) -> TrainStep:
        config = config_of(**BASE | changes, train__parallel__workers=workers)
        model, step = build(config)
        model.train()
        made.append(step)
        return step

    yield make
    for step in made:
        step.close()


@pytest.fixture
def double() -> Iterator[None]:
    """All in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def batches(number: int, count: int = 1, rows: int = 4, length: int = 64) -> MicroBatches:
    """Micro-batches of step ``number``, with some targets masked."""
    rng = np.random.default_rng(number)
    found = []
    for _ in range(count):
        ids = torch.from_numpy(rng.integers(0, 300, (rows, length + 1)))
        targets = ids[:, 1:].clone()
        targets[torch.from_numpy(rng.random((rows, length)) < 0.2)] = -100
        found.append((ids[:, :-1].contiguous(), targets))
    return found


@pytest.mark.parametrize("compiled", ["off", pytest.param("on", marks=pytest.mark.slow)])
def test_two_workers_give_the_bits_of_one_process_with_the_same_split(
    compiled: str, step_with: Callable[..., TrainStep]
) -> None:
    if compiled == "on" and cannot_compile():
        pytest.skip(str(cannot_compile()))
    changes = {"train__compile": compiled, "model__n_layers": 2}
    together, alone = step_with(2, **changes), step_with(1, **changes)
    assert together.compiled == alone.compiled == (compiled == "on")
    for number in range(4):
        ((ids, targets),) = batches(number)
        parts = [(ids[:2], targets[:2]), (ids[2:], targets[2:])]
        ours, reference = together([(ids, targets)], 1e-2), alone(parts, 1e-2)
        assert ours.applied
        assert ours.grad_norm == reference.grad_norm
        assert ours.loss == pytest.approx(reference.loss, rel=1e-6)
        assert torch.equal(together.arena.weights, alone.arena.weights)
        assert torch.equal(together.arena.grad, alone.arena.grad)


def test_computed_cores_and_low_precision_are_shared(step_with: Callable[..., TrainStep]) -> None:
    changes = {"train__dtype": "bf16", "model__embedding__kind": "reduced"}
    changes |= {"model__embedding__rank": 8, "model__embedding__lattice": "z"}
    together, alone = step_with(2, **changes), step_with(1, **changes)
    assert together.cores
    for number in range(3):
        ((ids, targets),) = batches(number)
        together([(ids, targets)], 1e-2)
        alone([(ids[:2], targets[:2]), (ids[2:], targets[2:])], 1e-2)
        assert torch.equal(together.arena.weights, alone.arena.weights)


def test_more_micro_batches_than_workers(step_with: Callable[..., TrainStep]) -> None:
    changes = {"train__accumulate": 3, "train__batch_size": 3}
    together, alone = step_with(2, **changes), step_with(1, **changes)
    for number in range(2):
        some = batches(number, count=3, rows=3)
        norms = [step(some, 1e-2).grad_norm for step in (together, alone)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    difference = (together.arena.grad - alone.arena.grad).norm() / alone.arena.grad.norm()
    assert float(difference) <= 1e-5


@pytest.mark.parametrize(("workers", "accumulate"), [(3, 4), (4, 6)])
def test_any_split_gives_the_bits_of_its_summation_tree(
    workers: int, accumulate: int, double: None, step_with: Callable[..., TrainStep]
) -> None:
    """Each worker's shards are added in order, then the workers' sums: whole micro-batches, of which one
    has two, and parts of each."""
    changes = {"model__d_model": 32, "model__n_layers": 1, "model__context": 16}
    changes["train__accumulate"] = accumulate
    together, alone = step_with(workers, **changes), step_with(1, **changes)
    for number in range(2):
        some = batches(number, count=accumulate, length=16)
        found = together(some, 1e-2)
        assert together.crew is not None
        assert len(together.crew.shards) == workers
        scale, loss, sums = 1.0 / target_count(some), 0.0, []
        for share in together.crew.shards:
            micros = [Micro(*(side[s.first : s.last] for side in some[s.micro])) for s in share]
            loss += alone.accumulate(micros, len(micros), scale)
            sums.append(alone.arena.grad.clone())
        grad = sums[0]
        for other in sums[1:]:
            grad += other
        figures = alone.finish(Summed(loss), grad, Numbers(scale, 1.0, 1e-2, number + 1))
        assert (figures.norm, figures.applied) == (found.grad_norm, True)
        assert torch.equal(together.arena.grad, grad)
        assert torch.equal(together.arena.weights, alone.arena.weights)


def test_the_same_seed_and_workers_give_the_same_bits(step_with: Callable[..., TrainStep]) -> None:
    changes = {"train__accumulate": 3, "model__residual_dropout": 0.2, "model__d_model": 32}
    found = []
    for _ in range(2):
        step = step_with(2, **changes)
        for number in range(3):
            torch.manual_seed(number)
            step(batches(number, count=3), 1e-2)
        found.append(step.arena.weights.clone())
        step.close()
    assert torch.equal(*found)


def test_a_step_with_workers_allocates_in_the_graph_only(
    step_with: Callable[..., TrainStep], allocations: Callable[..., tuple[int, int]]
) -> None:
    step = step_with(2)
    feed = Feed(token_source(), step.config)
    step(feed(0), 1e-2)
    outside, inside = allocations(step, feed)
    assert outside == 0
    assert inside > 0


def token_source() -> BatchSource:
    """Windows of random tokens."""
    ids = np.append(np.random.default_rng(1).integers(1, 300, 3000), 0)
    ids[0] = 0
    return BatchSource(PackedTokens.from_arrays(ids, text_bytes=3000), 64, 4, seed=4)


def test_four_workers_follow_the_curve_of_one(
    double: None, step_with: Callable[..., TrainStep]
) -> None:
    changes = {"model__d_model": 32, "model__n_layers": 1, "model__context": 16}
    steps = [step_with(workers, **changes) for workers in (1, 4)]
    assert steps[0].arena.compute.dtype == torch.float64
    curves: list[list[float]] = [[], []]
    for number in range(200):
        some = batches(number % 10, length=16)
        for step, curve in zip(steps, curves, strict=True):
            curve.append(step(some, 3e-3).loss)
    assert curves[0][-1] < curves[0][0] - 0.5
    assert np.abs(np.array(curves[0]) - curves[1]).max() <= 1e-9
    alone, together = steps
    together.arena.weights.copy_(alone.arena.weights)
    _, grad = alone.gradient(batches(0, length=16))
    result = together(batches(0, length=16), 0.0)
    clipped = grad * clip_factor(result.grad_norm, together.config.clip)  # as the update leaves it
    assert float((clipped - together.arena.grad).norm() / clipped.norm()) <= 1e-12


def test_a_lost_worker_is_named_and_nothing_of_its_step_is_applied(
    step_with: Callable[..., TrainStep],
) -> None:
    step = step_with(2)
    step(batches(0), 1e-2)
    assert step.crew is not None
    before = step.arena.weights.clone()
    (process,) = step.crew._processes
    process.kill()
    with pytest.raises(
        WorkerError, match=r"worker 1 \(process \d+\) was killed by signal 9.*resume"
    ):
        step(batches(1), 1e-2)
    assert torch.equal(step.arena.weights, before)
    step.close()


@pytest.mark.parametrize("during", ["add_up", "apply"])
def test_a_worker_lost_at_the_end_of_a_step_leaves_what_was_or_nothing_to_save(
    during: str,
    step_with: Callable[..., TrainStep],
) -> None:
    step = step_with(2)
    step(batches(0), 1e-2)
    assert step.crew is not None
    assert step.is_whole
    (process,) = step.crew._processes
    own = step.crew._own
    # It never gets to what it is asked for next, and is gone when the parent has done its part of that.
    before_it = (step.crew, "results") if during == "add_up" else (own.norm, "total")
    call, last = getattr(own, during), getattr(*before_it)

    def stop() -> Any:
        found = last()
        process.send_signal(signal.SIGSTOP)
        return found

    def end(*numbers: float) -> None:
        call(*numbers)
        process.kill()
        process.wait()

    setattr(*before_it, stop)
    setattr(own, during, end)
    before = step.arena.weights.clone()
    with pytest.raises(WorkerError, match="killed by signal 9"):
        step(batches(1), 1e-2)
    unchanged = during == "add_up"
    assert step.is_whole == unchanged
    assert torch.equal(step.arena.weights, before) == unchanged


def test_more_workers_than_cores_are_warned_of(
    config_of: ConfigOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = dataclasses.replace(machine(), cores=2, quota=None, threads=2)
    monkeypatch.setattr(choosing, "machine", lambda: two)
    asked = config_of(**BASE | {"train__parallel__workers": 4})
    (warning,) = choose(asked).warnings
    assert warning.startswith("train.parallel.workers = 4 are more than the 2 cores")
    assert not choose(config_of(**BASE | {"train__parallel__workers": 2})).warnings


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"train__batch_size": 3}, r"the 3 windows of a step .* do not divide into 2 workers"),
        ({"model__norm": "batchnorm"}, "batchnorm"),
        ({"train__loss": "sampled", "train__sampled__candidates": 8}, "sampled"),
        ({"train__similarity__weight": 0.1}, "similarity"),
        ({"train__device": "cuda"}, "torchrun"),
    ],
)
def test_what_does_not_go_with_workers_is_refused(
    changes: dict[str, Any], why: str, config_of: ConfigOf
) -> None:
    with pytest.raises(UsageError, match=why):
        choose(config_of(**BASE | {"train__parallel__workers": 2} | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"train__batch_size": 3},
        {"model__norm": "batchnorm"},
        {"train__loss": "sampled", "train__sampled__candidates": 8},
        {"train__similarity__weight": 0.1},
    ],
)
def test_auto_takes_one_worker_where_several_do_not_do(
    changes: dict[str, Any], config_of: ConfigOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = dataclasses.replace(machine(), cores=2, quota=None, threads=2)
    monkeypatch.setattr(choosing, "machine", lambda: two)
    asked = BASE | {"train__parallel__workers": "auto"}
    assert choose(config_of(**asked)).config.train.parallel.workers == 2
    assert choose(config_of(**asked | changes)).config.train.parallel.workers == 1


def test_the_cores_of_the_parent_are_its_own_again(step_with: Callable[..., TrainStep]) -> None:
    before = os.sched_getaffinity(0)
    if len(before) < 2:
        pytest.skip("needs two cores")
    two = set(sorted(before)[:2])
    os.sched_setaffinity(0, two)
    try:
        step = step_with(2)
        assert step.crew is not None
        own = step.crew.results
        during: list[set[int]] = []

        def results() -> Any:
            during.append(os.sched_getaffinity(0))
            return own()

        step.crew.results = results  # type: ignore[method-assign]
        for number in range(2):
            step(batches(number), 1e-2)
        # Pinned after the first step, in which code may be compiled; the other has the other core.
        assert during == [two, {min(two)}]
        (process,) = step.crew._processes
        tasks = [int(task) for task in os.listdir(f"/proc/{process.pid}/task")]
        assert all(os.sched_getaffinity(task) == {max(two)} for task in tasks)
        step.close()
        assert os.sched_getaffinity(0) == two
    finally:
        os.sched_setaffinity(0, before)


def test_cores_are_taken_only_where_all_are(
    config_of: ConfigOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs of two workers would have the same two of four cores, and the others would be idle."""
    config = config_of(**BASE | {"train__parallel__workers": 2})
    for cores, pinned in ((1, []), (2, [[0], [1]]), (4, [])):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, n=cores: set(range(n)))
        assert cores_of_workers(config) == pinned


def test_auto_takes_as_many_workers_as_the_windows_divide_among(
    config_of: ConfigOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = dataclasses.replace(machine(), cores=12, quota=None, threads=12)
    monkeypatch.setattr(choosing, "machine", lambda: many)
    asked = BASE | {"train__parallel__workers": "auto", "train__batch_size": 16}
    choices = choose(config_of(**asked))
    assert choices.config.train.parallel.workers == 8
    assert choices.reasons["parallel.workers"].startswith("8: 12 cores, and train.batch_size = 16")


def test_a_worker_that_hangs_does_not_keep_the_others_waiting(
    step_with: Callable[..., TrainStep], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One deadline for all."""
    waited: list[float | None] = []

    class Hangs:
        def wait(self, seconds: float | None = None) -> None:
            waited.append(seconds)
            if seconds:
                time.sleep(seconds)
            if seconds is not None:
                raise subprocess.TimeoutExpired("worker", seconds)

        def kill(self) -> None:
            pass

    monkeypatch.setattr("cllm.training.parallel.crew._PATIENCE", 0.2)
    step = step_with(4)
    assert step.crew is not None
    step.crew._processes = [Hangs() for _ in range(3)]  # type: ignore[misc]
    step.crew.close()
    assert sum(seconds for seconds in waited if seconds is not None) <= 0.2
    assert waited.count(None) == 3

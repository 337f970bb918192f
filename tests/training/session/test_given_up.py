"""A signal, or a worker that is gone, in the middle of what takes long: what is whole is saved."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cllm.core.config import Config
from cllm.store.run import RunDirectory
from cllm.training import session, trainer
from cllm.training.interrupt import Interrupt, InterruptedRunError
from cllm.training.parallel.crew import WorkerError
from cllm.training.pipeline.ahead import Ahead
from cllm.training.pipeline.halves import Halves
from cllm.training.session import resume, start
from cllm.training.step import TrainStep
from cllm.training.update import Update

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")

ConfigOf = Callable[..., Config]
Same = Callable[[Path, Path], None]


@pytest.fixture
def config(config_of: ConfigOf, corpus: Path) -> ConfigOf:
    """14 steps, validated at 7 and 14, with a checkpoint at 3, 6, 9 and 12."""
    periods = {"train__steps": 14, "train__checkpoint_every": 3, "train__eval_every": 7}
    dropout = {"model__residual_dropout": 0.1, "log__every": 2}

    def make(**changes: Any) -> Config:
        return config_of(data__paths=(str(corpus),), **periods | dropout | changes)

    return make


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a signal finds at work is given up at once; no report is written, as that takes a second."""
    monkeypatch.setattr(session, "write_report", lambda path: None)
    monkeypatch.setattr(session, "Interrupt", partial(Interrupt, patience=0.05))
    monkeypatch.setattr("cllm.training.interrupt.AGAIN", 0.2)


def never_ending(call: Callable[..., Any], number: int, *, after: bool = True) -> Any:
    """``call``, which at the ``number``-th time gets a signal, and does not come back; it does what it
    does before that, or not."""
    calls = iter(range(1, 1000))

    def instead(*arguments: Any, **named: Any) -> Any:
        if next(calls) != number:
            return call(*arguments, **named)
        if after:
            call(*arguments, **named)
        os.kill(os.getpid(), signal.SIGTERM)
        end = time.monotonic() + 30.0
        while time.monotonic() < end:
            time.sleep(0.01)
        raise AssertionError("it was not given up")

    return instead


def stopped(config: Config, run: Path, told: Any) -> str:
    """What a run says that a signal ends."""
    with pytest.raises(InterruptedRunError) as error:
        start(config, told, out=run)
    assert error.value.exit_code == 128 + signal.SIGTERM
    assert f"cllm train --resume {run}" in str(error.value)
    assert RunDirectory.open(run).status().state == "interrupted"
    return str(error.value)


GiveUp = Callable[..., str]


@pytest.fixture
def given_up(
    config: ConfigOf,
    tmp_path: Path,
    told: Any,
    monkeypatch: pytest.MonkeyPatch,
    assert_same_run: Same,
) -> GiveUp:
    """Trains with ``owner``'s method or function ``name`` given up at its ``number``-th call; what that
    says. The run has a checkpoint of step ``saved``, and goes on to the same bits as one that nobody
    stopped."""

    def make(owner: Any, name: str, number: int, saved: int, **changes: Any) -> str:
        run, straight = tmp_path / "run", tmp_path / "straight"
        start(config(**changes), told, out=straight)
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, never_ending(getattr(owner, name), number))
            said = stopped(config(**changes), run, told)
        assert RunDirectory.open(run).steps()[-1] == saved
        resume(run, [], told)
        assert_same_run(run, straight)
        return said

    return make


NORMS = {"model__norm": "batchnorm", "model__residual_dropout": 0.0}
IDLE = {"train__lazy_rows": "on", "model__tie_embeddings": False}


@pytest.mark.parametrize("changes", [{}, NORMS, IDLE], ids=["plain", "batchnorm", "idle rows"])
def test_a_step_that_is_given_up_costs_that_step_alone(
    changes: dict[str, Any], given_up: GiveUp
) -> None:
    # Forward and backward are done, running averages have moved, and nothing is updated yet.
    said = given_up(TrainStep, "_backward", 6, saved=5, **changes)
    assert "after step 5; the step that followed was given up" in said


@pytest.mark.parametrize("mode", ["off", "delayed"])
@pytest.mark.parametrize("name", ["evaluate", "sample_texts"])
def test_a_validation_that_is_given_up_is_made_when_the_run_goes_on(
    name: str, mode: str, given_up: GiveUp
) -> None:
    said = given_up(trainer, name, 1, saved=7, train__pipeline__mode=mode)
    assert "after step 7; its validation was given up" in said


def test_an_update_that_is_given_up_is_not_saved(given_up: GiveUp) -> None:
    said = given_up(Update, "apply", 6, saved=3)
    assert "after step 3; what followed is lost" in said


def test_a_delayed_run_goes_back_to_its_last_drain(given_up: GiveUp) -> None:
    delayed = {"train__pipeline__mode": "delayed", "train__checkpoint_every": 14}
    said = given_up(Ahead, "step", 10, saved=7, **delayed)
    assert "after step 7; the step that followed was given up" in said


def test_a_stage_that_does_not_end_keeps_nobody(
    config: ConfigOf, tmp_path: Path, told: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that compiles: its thread cannot be given up, and ends with the process."""
    for name in ("PATIENCE", "STAGES_PATIENCE"):
        monkeypatch.setattr(trainer, name, 0.2)
    go, forward, calls = threading.Event(), Halves.forward, iter(range(1, 1000))

    def waits(*arguments: Any) -> Any:
        if next(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
            assert go.wait(60.0)
        return forward(*arguments)

    monkeypatch.setattr(Halves, "forward", waits)
    before = set(threading.enumerate())
    began = time.monotonic()
    said = stopped(config(train__pipeline__mode="delayed"), tmp_path / "run", told)
    assert time.monotonic() - began < 50.0
    assert "after step 3" in said
    assert RunDirectory.open(tmp_path / "run").steps()[-1] == 3
    go.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(60.0)


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs memfd")
def test_a_lost_worker_ends_a_parent_that_computes(
    config: ConfigOf, tmp_path: Path, told: Any, monkeypatch: pytest.MonkeyPatch, isolated: Path
) -> None:
    backward, calls = TrainStep._backward, iter(range(1, 1000))

    def computes(step: TrainStep, *arguments: Any) -> Any:
        found = backward(step, *arguments)
        if next(calls) == 5:
            assert step.crew is not None
            step.crew._processes[0].kill()
            end = time.monotonic() + 30.0
            while time.monotonic() < end:
                try:
                    time.sleep(0.01)
                except Exception as error:
                    raise RuntimeError("InductorError") from error
            raise AssertionError("it was not told of it")
        return found

    monkeypatch.setattr(TrainStep, "_backward", computes)
    with pytest.raises(WorkerError, match=r"worker 1 .* was killed by signal 9.*--resume"):
        start(config(train__parallel__workers=2), told, out=tmp_path / "run")
    assert RunDirectory.open(tmp_path / "run").steps()[-1] == 3

"""Work beside the steps: batches prepared ahead, log and checkpoints written behind; bits are the same."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cllm.core.config import Config
from cllm.core.errors import UserError
from cllm.core.settings import build
from cllm.store import checkpoint as checkpoints
from cllm.store.run import RunDirectory
from cllm.text.batches import BatchSource
from cllm.text.packed import PackedTokens
from cllm.training.background import Background
from cllm.training.feed import Feed, micro_batches
from cllm.training.session import start
from cllm.training.trainer import Trainer

ConfigOf = Callable[..., Config]
PATIENCE = 30.0
"""Seconds after which a test that waits has failed."""


@pytest.fixture
def config(config_of: ConfigOf, corpus: Path) -> ConfigOf:
    """Makes a configuration of 12 steps with checkpoints at 4, 8 and 12."""
    periods = {"train__steps": 12, "train__checkpoint_every": 4, "train__eval_every": 6}
    kept = {"train__keep_last": 9, "log__every": 2, "model__residual_dropout": 0.1}

    def make(**changes: Any) -> Config:
        return config_of(data__paths=(str(corpus),), **periods, **kept, **changes)

    return make


def test_tasks_are_done_in_order_and_an_error_comes_with_the_next_one() -> None:
    background, done, go = Background(threaded=True), [], threading.Event()

    def fail() -> None:
        assert go.wait(PATIENCE)
        raise UserError("no room")

    background.hand_over(done.append, 1)
    background.hand_over(fail)
    background.hand_over(done.append, 2)  # handed over before the error was known
    go.set()
    with pytest.raises(UserError, match="no room"):
        background.wait()
    assert done == [1]
    background.close()
    assert not [t for t in threading.enumerate() if t.name == "background"]
    at_once = Background(threaded=False)
    at_once.hand_over(done.append, 3)
    assert done == [1, 3]
    with pytest.raises(ZeroDivisionError):
        at_once.hand_over(lambda: 1 // 0)


def test_what_was_written_is_not_kept_until_the_next_task() -> None:
    """A copy of weights and moments would double what training takes."""

    class Copy:
        pass

    background, copy = Background(threaded=True), Copy()
    seen = weakref.ref(copy)
    background.hand_over(lambda value: None, copy)
    del copy
    background.wait()
    end = time.monotonic() + PATIENCE
    while seen() is not None:
        assert time.monotonic() < end, "it is still there"
        time.sleep(1e-3)
    background.close()


@pytest.mark.parametrize(("ahead", "held"), [(False, 0), (True, 0), (True, 2)])
def test_batches_come_from_few_buffers_and_stay_as_long_as_is_said(
    ahead: bool, held: int, fast: dict[str, Any]
) -> None:
    train = build(fast | {"train.batch_size": 2, "train.accumulate": 3}).train
    ids = np.append(np.random.default_rng(1).integers(1, 300, 300), 0)
    ids[0] = 0
    source = BatchSource(PackedTokens.from_arrays(ids, text_bytes=300), 8, 2, seed=4)
    feed = Feed(source, train, held=held, ahead=ahead)
    taken, places = [], set()
    for at in range(3, 10):
        taken.append((at, feed(at)))
        places |= {ids.data_ptr() for ids, _ in taken[-1][1][:1]}
        if ahead and feed._next is not None:
            feed._next[1].result()  # the next one is there, and has harmed none that is held
        for number, batches in taken[-1 - held :]:
            for pair, expected in zip(batches, micro_batches(source, train, number), strict=True):
                assert np.array_equal(pair[0].numpy(), expected[0].numpy())
                assert np.array_equal(pair[1].numpy(), expected[1].numpy())
    for pair, expected in zip(feed(0), micro_batches(source, train, 0), strict=True):
        assert np.array_equal(pair[0].numpy(), expected[0].numpy()), "another was prepared"
    feed.close()
    assert len(places) == 1 + held + ahead


@pytest.mark.parametrize("mode", ["off", "delayed"])
def test_a_run_that_overlaps_has_the_bits_of_the_plain_loop(
    mode: str,
    config: ConfigOf,
    tmp_path: Path,
    told: Any,
    state_of: Callable[[Path], dict[str, Any]],
    assert_same_state: Callable[[Any, Any], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every checkpoint, too, though each is written late."""
    trainers: list[Trainer] = []
    save, fit = checkpoints.save, Trainer.fit

    def remembered(trainer: Trainer, interrupt: Any) -> str:
        trainers.append(trainer)
        return fit(trainer, interrupt)

    def late(run: Path, step: int, **contents: Any) -> Path:
        """Not before training has gone on by a step."""
        end = time.monotonic() + PATIENCE
        while 0 < step < 12 and trainers[-1].standing.step == step:
            assert time.monotonic() < end, "training waits for the checkpoint"
            time.sleep(1e-3)
        return save(run, step, **contents)

    ours, plain = tmp_path / "ours", tmp_path / "plain"
    monkeypatch.setattr(Trainer, "fit", remembered)
    start(config(train__pipeline__mode=mode, train__overlap=False), told, out=plain)
    monkeypatch.setattr(checkpoints, "save", late)
    start(config(train__pipeline__mode=mode), told, out=ours)
    found, expected = state_of(ours), state_of(plain)
    assert found.pop("config") == expected.pop("config").replace(
        "overlap = false", "overlap = true"
    )
    assert_same_state(found, expected)
    assert RunDirectory(ours).steps() == RunDirectory(plain).steps() == [0, 4, 6, 8, 12]
    for step in (4, 6, 8):
        one, other = (checkpoints.load(run, step) for run in (ours, plain))
        assert_same_state(one.weights, other.weights)
        assert_same_state(one.optimizer["moments"], other.optimizer["moments"])
        assert one.state["standing"]["tokens"] == other.state["standing"]["tokens"]
    names = {thread.name for thread in threading.enumerate()}
    assert not [name for name in names if name.startswith(("background", "next batch"))]


@pytest.mark.parametrize("at", [4, 12])
def test_a_checkpoint_that_cannot_be_written_ends_the_run(
    at: int, config: ConfigOf, tmp_path: Path, told: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = checkpoints.save

    def refuse(run: Path, step: int, **contents: Any) -> Path:
        if step == at:
            raise UserError("the disk is full")
        return save(run, step, **contents)

    monkeypatch.setattr(checkpoints, "save", refuse)
    with pytest.raises(UserError, match="the disk is full"):
        start(config(), told, out=tmp_path / "run")
    run = RunDirectory.open(tmp_path / "run")
    assert run.status().state == "interrupted"
    assert run.steps()[-1] < at

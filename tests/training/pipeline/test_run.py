"""A run with the delayed pipeline: it drains where it should, resumes to the same bits, and refuses."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cllm.core.config import Config
from cllm.core.errors import UsageError
from cllm.store.run import RunDirectory
from cllm.training.interrupt import InterruptedRunError
from cllm.training.pipeline.ahead import Ahead
from cllm.training.session import resume, start
from cllm.training.snapshot import Standing
from cllm.training.step import TrainStep
from cllm.training.trainer import Trainer

ConfigOf = Callable[..., Config]
DELAYED: dict[str, Any] = {"train__pipeline__mode": "delayed"}


@pytest.fixture
def delayed(config_of: ConfigOf, corpus: Path) -> Config:
    """23 steps, drained at 6, 9, 12, 18 and 23."""
    periods = {"train__eval_every": 9, "train__checkpoint_every": 6, "train__steps": 23}
    dropout = {"model__residual_dropout": 0.1}
    return config_of(data__paths=(str(corpus),), **periods, **dropout, **DELAYED)


def test_a_stopped_run_goes_back_to_its_last_drain_and_resumes_to_the_same_bits(
    delayed: Config,
    tmp_path: Path,
    told: Any,
    monkeypatch: pytest.MonkeyPatch,
    assert_same_run: Callable[[Path, Path], None],
) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    start(delayed, told, out=straight)
    one_step = Trainer._one_step

    def with_a_signal(trainer: Trainer) -> Any:
        if trainer.standing.step == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        return one_step(trainer)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_one_step", with_a_signal)
        with pytest.raises(InterruptedRunError, match="after step 9;"):
            start(delayed, told, out=stopped)
    assert RunDirectory.open(stopped).steps()[-1] == 9
    resume(stopped, [], told)
    assert_same_run(stopped, straight)


def test_a_time_budget_is_refused(delayed: Config, tmp_path: Path, told: Any) -> None:
    """What it measures is the plain loop."""
    with pytest.raises(UsageError, match=r"--time .* train\.pipeline\.mode = 'delayed'"):
        start(delayed, told, out=tmp_path / "run", seconds=60.0)
    assert not (tmp_path / "run").exists()


def test_the_copy_of_the_last_drain_is_made_once(
    step_of: Callable[..., TrainStep], delayed: Config
) -> None:
    step = step_of()
    ahead = Ahead(step, delayed.train, lambda at: [], lambda at: None)
    ahead.keep(Standing(step=1))
    places = [kept.data_ptr() for kept in ahead._buffers]
    step.arena.weights.add_(1.0)
    expected = step.arena.weights.clone()
    ahead.keep(Standing(step=2))
    assert [kept.data_ptr() for kept in ahead._buffers] == places
    step.arena.weights.zero_()
    assert ahead.rewind() == Standing(step=2)
    assert torch.equal(step.arena.weights, expected)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train__dtype": "fp16"}, "train.dtype = 'fp16'"),
        ({"train__parallel__workers": 2}, "train.parallel.workers = 2"),
        ({"train__lazy_rows": "on", "model__tie_embeddings": False}, "train.lazy_rows = 'on'"),
        ({"train__loss": "sampled", "train__sampled__candidates": 8}, "train.loss = 'sampled'"),
        ({"train__similarity__weight": 0.1}, "train.similarity.weight"),
        ({"train__device": "cuda"}, "train.device = 'cuda'"),
        ({"model__norm": "batchnorm"}, "model.norm = 'batchnorm'"),
        ({"model__embedding__kind": "composed"}, "model.embedding.kind = 'composed'"),
        ({"model__embedding__lattice": "z"}, "model.embedding.lattice = 'z'"),
    ],
)
def test_what_does_not_go_with_a_delay_is_refused_by_name(
    changes: dict[str, Any], named: str, config_of: ConfigOf
) -> None:
    config_of(**changes)
    with pytest.raises(UsageError, match=r"train\.pipeline\.mode = 'delayed'") as caught:
        config_of(**DELAYED, **changes)
    assert named in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1

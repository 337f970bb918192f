"""Runs of the smallest model, and what a test may do to them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from cllm.core.config import Config
from cllm.training import resolve, session, trainer
from cllm.training.conclude import Outcome
from cllm.training.evaluate import Evaluation

Start = Callable[..., Outcome]
Resume = Callable[..., Outcome]


@pytest.fixture
def start(
    isolated: Path,
    corpus: Path,
    told: Any,
    config_of: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
) -> Start:
    """Trains into the directory ``name``; without the report, whose pictures take a second."""
    monkeypatch.setattr(session, "write_report", lambda path: None)
    monkeypatch.setattr(resolve, "is_busy", lambda: None)

    def run(
        name: str = "run",
        *,
        from_run: Path | None = None,
        seconds: float | None = None,
        **changes: Any,
    ) -> Outcome:
        config = config_of(data__paths=(str(corpus),), **changes)
        out = isolated / name
        return session.start(config, told, out=out, from_run=from_run, seconds=seconds)

    return run


@pytest.fixture
def resume(told: Any) -> Resume:
    """``cllm train --resume``."""
    return lambda path, *settings: session.resume(path, settings, told)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[float]], None]:
    """Makes validations score the given bits per byte in turn, and the last for ever."""

    def install(values: Sequence[float]) -> None:
        left = list(values)

        def evaluate(*arguments: Any, **named: Any) -> Evaluation:
            bpb = left.pop(0) if len(left) > 1 else left[0]
            return Evaluation(loss=bpb, bpb=bpb, perplexity=math.exp(bpb), tokens=1, bytes=1)

        monkeypatch.setattr(trainer, "evaluate", evaluate)

    return install


@pytest.fixture(autouse=True)
def _no_leftovers(tmp_path: Path) -> Iterator[None]:
    """Whatever a test does, no temporary directory stays."""
    yield
    assert not [path for path in tmp_path.rglob(".tmp-*") if "copy" not in path.parts]

"""Workers that wait at random at every hand-over: no race, and no deadlock."""

from __future__ import annotations

import faulthandler
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cllm.core.config import Config
from cllm.training.build import build
from cllm.training.parallel import wire
from cllm.training.parallel.crew import Crew

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs memfd")

DROPOUT = {"model__residual_dropout": 0.1}


@pytest.fixture
def watchdog() -> Iterator[None]:
    """Ends the tests with every thread's stack where one hangs: a deadlock is no endless wait."""
    faulthandler.dump_traceback_later(120, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.mark.parametrize(
    ("workers", "accumulate", "steps"),
    [(2, 1, 25), pytest.param(4, 3, 400, marks=pytest.mark.slow)],
)
def test_random_delays_at_every_hand_over_change_no_bit(
    workers: int,
    accumulate: int,
    steps: int,
    watchdog: None,
    isolated: Path,
    config_of: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from importlib.util import module_from_spec, spec_from_file_location

    file = Path(__file__).with_name("delayed_worker.py")
    spec = spec_from_file_location("delayed_worker", file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    changes: dict[str, Any] = {"model__vocab_size": 300, "model__d_model": 32}
    changes |= {"train__loss_chunk": 0, "train__lazy_rows": "off", "train__accumulate": accumulate}
    config = config_of(**changes, **DROPOUT, train__parallel__workers=workers)

    def weights() -> list[torch.Tensor]:
        torch.manual_seed(5)
        model, step = build(config)
        model.train()
        found = []
        try:
            for number in range(steps):
                ids = np.random.default_rng(number).integers(0, 300, (accumulate, 4, 65))
                parts = torch.from_numpy(ids)
                step([(p[:, :-1].contiguous(), p[:, 1:].contiguous()) for p in parts], 1e-2)
                found.append(step.arena.weights.clone())
        finally:
            step.close()
        return found

    calm = weights()
    seed = str(random.Random().random())
    print("delays", seed)
    monkeypatch.setenv("DELAYS", seed)
    rng = random.Random(seed)
    monkeypatch.setattr(Crew, "program", (sys.executable, str(file)))
    monkeypatch.setattr(wire, "receive", module.delayed(wire.receive, rng))
    for name in ("begin", "results", "norm", "apply"):
        monkeypatch.setattr(Crew, name, module.delayed(getattr(Crew, name), rng))
    hurried = weights()
    assert all(torch.equal(one, other) for one, other in zip(calm, hurried, strict=True))
    assert not torch.equal(calm[0], calm[-1])

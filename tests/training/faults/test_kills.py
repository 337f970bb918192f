"""Kills at random moments, one after the other: nothing is lost but the steps since the last checkpoint."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cllm.store.metrics import read_columns
from cllm.store.run import RunDirectory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def kill_at_random(hurt: Any, run: Path, number: int, rng: random.Random) -> str:
    """Kill one of its processes (each kind in turn, then any) soon after its first new step or, one time in
    five, wherever it is; which one."""
    log = run / "metrics.jsonl"
    before = log.stat().st_size if log.exists() else 0
    anywhere = run.exists() and rng.random() < 0.2
    if not anywhere:
        hurt.wait(lambda: log.exists() and log.stat().st_size > before)
    time.sleep(rng.uniform(0.0, 2.0 if anywhere else 0.15))
    everyone, roles = hurt.everyone(), hurt.roles()
    kinds = hurt.strategy.roles
    wanted = kinds[number] if number < len(kinds) else rng.choice(kinds)
    victim = wanted if wanted in roles else rng.choice(sorted(roles))
    os.kill(roles[victim], signal.SIGKILL)
    hurt.end(everyone)
    return victim


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("workers", 1),
        pytest.param("workers", 50, marks=pytest.mark.slow),
        pytest.param("ddp", 50, marks=pytest.mark.slow),
    ],
)
def test_random_kills_lose_nothing_but_the_steps_since_the_last_checkpoint(
    name: str,
    count: int,
    tmp_path: Path,
    begin: Callable[..., Any],
    arguments: Callable[..., list[object]],
    assert_clean: Callable[[Any, Path], None],
    assert_same_run: Callable[[Path, Path], None],
) -> None:
    steps, seed = 30 + 20 * count, random.randrange(2**32)
    print("kills of seed", seed)
    changes = {"train__steps": steps, "train__checkpoint_every": 5, "train__keep_last": 3}
    asked = arguments(name, **changes, train__eval_every=steps // 2)
    run, straight, rng = tmp_path / "run", tmp_path / "straight", random.Random(seed)
    hurt, saved = begin(name, *asked, "--out", run), 0
    for number in range(count):
        victim = kill_at_random(hurt, run, number, rng)
        assert hurt.child.returncode != 0
        assert len(hurt.said) <= 1, hurt.lines
        if victim == "last" and name == "workers":
            assert "worker 1 (process " in hurt.said[0]
            assert "--resume" in hurt.said[0]
        assert_clean(hurt, run)
        resumed = [line for line in hurt.lines if line.startswith("resuming ")]
        assert all(line == f"resuming {run} at step {saved}" for line in resumed), resumed
        before, saved = saved, RunDirectory.open(run).steps()[-1]
        assert saved >= before
        print(f"kill {number}: {victim} at {saved}, which said {hurt.said}", flush=True)
        hurt = begin(name, "--resume", run)
    hurt.finish()
    assert f"resuming {run} at step {saved}" in hurt.lines
    begin(name, *asked, "--out", straight).finish()
    assert_same_run(run, straight)
    status = RunDirectory.open(run).status()
    assert status.state == "finished"
    assert len(status.sessions) > 1
    assert len(read_columns(run / "metrics.jsonl", "train")["loss"]) == steps

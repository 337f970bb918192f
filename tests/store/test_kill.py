"""A real process, really killed, at twenty random moments: the newest whole checkpoint always loads."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cllm.core.atomic import PREFIX
from cllm.store import checkpoint
from cllm.store.metrics import read_columns
from cllm.store.run import RunDirectory
from cllm.store.steps import best_step

SAVER = Path(__file__).with_name("crash_saver.py")


@pytest.fixture
def savers(run: RunDirectory) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, SAVER, run.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    yield process
    process.communicate()
    assert process.returncode == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_kill_at_random_moments(run: RunDirectory, savers: subprocess.Popen[str]) -> None:
    assert savers.stdin is not None
    assert savers.stdout is not None
    rng = random.Random(2)
    newest, interrupted_saves = 0, 0
    for _ in range(20):
        print("start", file=savers.stdin, flush=True)
        victim = int(savers.stdout.readline())
        time.sleep(rng.uniform(0.0, 0.25))
        os.kill(victim, signal.SIGKILL)
        assert savers.stdout.readline() == "dead\n"
        assert run.status().state == "interrupted"
        interrupted_saves += any(
            path.name.startswith(PREFIX) for path in run.checkpoints.glob(".*")
        )
        if not run.steps():
            continue
        loaded = checkpoint.load(run.path)
        assert loaded.step == run.steps()[-1] >= newest
        newest = loaded.step
        assert (loaded.weights["w"] == newest).all()
        assert (loaded.optimizer["m"] == newest + 1).all()
        assert loaded.state == {"step": newest}
        best = best_step(run.path)
        assert (
            best is None
            or checkpoint.load(run.path, "best").step == best >= newest - newest % 3 - 3
        )
        columns = read_columns(run.metrics, "train")
        assert columns["step"] == list(range(1, len(columns["step"]) + 1))
        assert len(columns["step"]) >= newest
    assert newest > 0
    assert interrupted_saves > 0, "no kill fell into a save: the test has tested nothing"
    with run.training():  # opening it cleans what the kills left
        assert not list(run.checkpoints.glob(f"{PREFIX}*"))
        # A kill between a save and its pruning leaves one too many, which the next save prunes.
        last = checkpoint.load(run.path)
        checkpoint.save(
            run.path,
            last.step + 1,
            weights=last.weights,
            optimizer=last.optimizer,
            state=last.state,
            keep_last=2,
            best=False,
        )
        assert len(run.steps()) <= 3

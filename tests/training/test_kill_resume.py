"""Killed, interrupted or damaged, a run goes on to the same bits: with real processes and signals."""

from __future__ import annotations

import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cllm.store.metrics import last_line, read_columns
from cllm.store.run import RunDirectory

needs_signals = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
Start = Callable[..., subprocess.Popen[str]]
Same = Callable[[Path, Path], None]

# 4 windows of 64 tokens, twice a step, of some 500 windows: 70 steps end in the second epoch.
LONG = {"train__steps": 70, "train__accumulate": 2, "train__eval_every": 11}
LONG |= {"train__checkpoint_every": 5, "log__every": 3, "log__sample_tokens": 3}
DROPOUT = {
    "model__residual_dropout": 0.1,
    "model__attention_dropout": 0.1,
    "model__embedding_dropout": 0.1,
}


def wait_for(path: Path, child: subprocess.Popen[str]) -> None:
    """Until ``path`` is there."""
    while not path.exists():
        assert child.poll() is None, f"it ended before {path.name}: {child.stderr.read()}"
        time.sleep(0.002)


def end(child: subprocess.Popen[str], code: int = 0) -> str:
    """What a process printed, once it has ended as it should."""
    out, err = child.communicate()
    assert child.returncode == code, err
    assert "Traceback" not in err
    return out + err


def kill_and_resume(
    run: Path,
    straight: Path,
    arguments: list[str],
    process: Start,
    kills: list[tuple[int, float]],
    assert_same_run: Same,
) -> None:
    """Train ``run`` killing it at each (checkpoint, seconds after it); then compare with ``straight``."""
    child = process("train", *arguments, "--out", run)
    for step, delay in kills:
        wait_for(run / "checkpoints" / f"step-{step:08d}", child)
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        assert child.returncode == -signal.SIGKILL, "it ended before it was killed"
        assert RunDirectory.open(run).status().state == "interrupted"
        child = process("train", "--resume", run)
    said = end(child)
    assert f"resuming {run} at step" in said
    assert "warning: threads" not in said
    assert_same_run(run, straight)
    status = RunDirectory.open(run).status()
    assert status.state == "finished"
    assert len(status.sessions) == len(kills) + 1
    for name in ("test_bpb", "validation_bpb", "tokens", "step"):
        assert status.facts[name] == RunDirectory.open(straight).status().facts[name]
    assert (run / "report.md").is_file()


@needs_signals
@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_killed_run_resumes_to_the_same_bits(
    dtype: str,
    tmp_path: Path,
    corpus: Path,
    process: Start,
    options: Callable[..., list[str]],
    assert_same_run: Same,
) -> None:
    # bf16 is slow where the processor has none; one layer rounds as two do.
    others = DROPOUT if dtype == "fp32" else {"model__n_layers": 1}
    arguments = ["--data", str(corpus), *options(**LONG, **others, train__dtype=dtype)]
    end(process("train", *arguments, "--out", tmp_path / "straight"))
    epochs = read_columns(tmp_path / "straight" / "metrics.jsonl", "train")["epoch"]
    assert epochs[-1] > 1.05
    assert epochs[len(epochs) // 2] % 1 > 0.05
    rng = random.Random()  # another moment each time
    kills = [
        (5 * rng.randint(1, 4), rng.uniform(0, 0.05)),
        (5 * rng.randint(6, 9), rng.uniform(0, 0.05)),
    ]
    print("killed at", kills)
    kill_and_resume(
        tmp_path / "run", tmp_path / "straight", arguments, process, kills, assert_same_run
    )


@needs_signals
@pytest.mark.slow
def test_a_killed_compiled_run_resumes_to_the_same_bits(
    tmp_path: Path,
    corpus: Path,
    process: Start,
    options: Callable[..., list[str]],
    assert_same_run: Same,
) -> None:
    changed = options(**LONG, train__dtype="bf16", train__compile="on")
    arguments = ["--data", str(corpus), *changed]
    end(process("train", *arguments, "--out", tmp_path / "straight"))
    kill_and_resume(
        tmp_path / "run",
        tmp_path / "straight",
        arguments,
        process,
        [(10, 0.03), (35, 0.01)],
        assert_same_run,
    )


@needs_signals
def test_a_signal_saves_and_names_the_command_that_goes_on(
    tmp_path: Path,
    corpus: Path,
    process: Start,
    options: Callable[..., list[str]],
    assert_same_run: Same,
) -> None:
    # No checkpoint but the first: what is resumed is what the signal saved.
    changes = {"train__steps": 120, "train__checkpoint_every": 1000, "train__eval_every": 50}
    arguments = ["--data", str(corpus), *options(**changes, **DROPOUT)]
    run, command = tmp_path / "a run", ["train", *arguments, "--out", str(tmp_path / "a run")]
    saved = 0
    for signum, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        child = process(*command)
        while (line := last_line(run / "metrics.jsonl", "train")) is None or line["step"] <= saved:
            assert child.poll() is None
            time.sleep(0.002)
        child.send_signal(signum)
        _, err = child.communicate()
        assert child.returncode == code
        assert "Traceback" not in err
        last = err.splitlines()[-1]
        before, saved = saved, RunDirectory.open(run).steps()[-1]
        assert last.startswith(f"cllm: stopped by {signum.name} after step {saved}; go on with: ")
        name, *command = shlex.split(last.split("go on with: ")[1])
        assert (name, command) == ("cllm", ["train", "--resume", str(run)])
        assert before < saved < 120
        status = RunDirectory.open(run).status()
        assert status.state == "interrupted"
        assert signum.name in status.reason
    end(process(*command))
    end(process("train", *arguments, "--out", tmp_path / "straight"))
    assert_same_run(run, tmp_path / "straight")

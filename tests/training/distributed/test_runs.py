"""``torchrun … -m cllm train`` as a user starts it: runs, restarts and conversion."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path

import pytest

from cllm.store import checkpoint
from cllm.store.metrics import read_columns

Start = Callable[..., subprocess.Popen[str]]
Options = Callable[..., list[str]]
Same = Callable[[Path, Path], None]
Ranks = Callable[[subprocess.Popen[str]], dict[int, int]]
CLLM = ("-m", "cllm")
LONG = {"train__steps": 60, "train__checkpoint_every": 10, "train__eval_every": 30}
DROPOUT = {"model__residual_dropout": 0.1, "model__embedding_dropout": 0.1}
pytestmark = [
    pytest.mark.slow,  # each starts torch several times
    pytest.mark.skipif(sys.platform != "linux", reason="torchrun is tested on Linux"),
]


def ours(said: str) -> list[str]:
    """The lines that are ours among torchrun's."""
    return [line for line in said.splitlines() if line.startswith("cllm: ")]


def finish(child: subprocess.Popen[str]) -> str:
    """What a torchrun said that ended well."""
    said, _ = child.communicate()
    assert child.returncode == 0, said
    return said


def test_shards_are_a_run_like_any_other(
    torchrun: Start,
    tmp_path: Path,
    corpus: Path,
    options: Options,
    cllm: Callable[..., object],
    assert_same_state: Callable[[object, object], None],
) -> None:
    run = tmp_path / "run"
    asked = options(train__parallel__strategy="fsdp", train__dtype="bf16")
    said = finish(torchrun(2, *CLLM, "train", "--data", corpus, *asked, "--out", run))
    assert said.count("step 6: validation") == 1  # one process speaks
    assert said.count(f"run: {run}") == 1
    last = run / "checkpoints" / "step-00000012"
    assert len(list((last / "sharded").glob("*.safetensors"))) == 2
    saved = checkpoint.load(last)
    assert not [n for n, t in saved.weights.items() if not bool(t.isfinite().all())]
    before = {"weights": saved.weights, "optimizer": saved.optimizer}
    assert cllm("runs", "convert", run).code == 0  # type: ignore[attr-defined]
    assert (last / "model.safetensors").is_file()
    assert not (last / "sharded").exists()
    after = checkpoint.load(last)
    assert set(after.optimizer["moments"]) == {"mean", "square"}
    for name, tensor in before["weights"].items():
        assert (after.weights[name] == tensor).all()
    assert cllm("runs", "convert", run, "--to", "sharded").code == 0  # type: ignore[attr-defined]
    again = checkpoint.load(last)
    assert_same_state(dict(sorted(again.weights.items())), dict(sorted(after.weights.items())))
    assert_same_state(again.optimizer["counters"], after.optimizer["counters"])
    result = cllm("train", "--resume", run, "--set", "train.steps=16")  # by one process
    assert result.code == 0, result.err  # type: ignore[attr-defined]
    assert "processes 2 by fsdp then, 1 now" in result.err  # type: ignore[attr-defined]
    losses = read_columns(run / "metrics.jsonl", "train")["loss"]
    assert len(losses) == 16
    assert losses[15] < losses[11] + 0.2 < losses[0]


def test_torchrun_restarts_and_the_run_goes_on_by_itself(
    torchrun: Start,
    tmp_path: Path,
    corpus: Path,
    options: Options,
    assert_same_run: Same,
    ranks: Ranks,
    wait_for: Callable[[Path, subprocess.Popen[str]], None],
) -> None:
    asked = options(**LONG | DROPOUT)
    command = [*CLLM, "train", "--data", corpus, *asked]
    elastic = ("--standalone", "--max-restarts", "2")
    child = torchrun(2, *command, options=elastic)  # it must find its numbered run
    folder = tmp_path / "runs"
    run = folder / f"{date.today().isoformat()}-corpus-1"
    wait_for(run / "checkpoints" / "step-00000010", child)
    os.kill(ranks(child)[1], signal.SIGKILL)
    said = finish(child)
    assert said.count(f"started its processes again: going on with runs/{run.name}") == 1, said
    assert len(list(folder.iterdir())) == 1
    finish(torchrun(2, *command, "--out", tmp_path / "straight"))
    assert_same_run(run, tmp_path / "straight")


def test_what_is_refused_is_said_once(torchrun: Start, corpus: Path, options: Options) -> None:
    asked = options(train__batch_size=3)
    child = torchrun(2, *CLLM, "train", "--data", corpus, *asked)
    said, _ = child.communicate(timeout=60)
    (line,) = ours(said)
    assert "do not divide into 2 processes of torchrun" in line

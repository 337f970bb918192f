"""Faults at moments of their own: before training, while it compiles, at a limit, and where a worker
hangs."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cllm.store.run import RunDirectory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

Begin = Callable[..., Any]
Arguments = Callable[..., list[object]]
Clean = Callable[[Any, Path], None]
ENDLESS = {"train__steps": 100_000, "train__eval_every": 50_000}


@pytest.fixture
def endless(tmp_path: Path, begin: Begin, arguments: Arguments) -> tuple[Any, Any, Path]:
    """Workers after their first checkpoints: what is to be hurt, all its processes, and the run."""
    run = tmp_path / "run"
    hurt = begin("workers", *arguments("workers", **ENDLESS), "--out", run)
    hurt.wait((run / "checkpoints" / "step-00000010").exists)
    return hurt, hurt.everyone(), run


def test_ctrl_c_while_the_workers_start(
    tmp_path: Path, begin: Begin, arguments: Arguments, assert_clean: Clean
) -> None:
    run = tmp_path / "run"
    hurt = begin("workers", *arguments("workers", **ENDLESS), "--out", run)
    hurt.wait(lambda: "last" in hurt.roles())
    everyone = hurt.everyone()
    os.killpg(hurt.child.pid, signal.SIGINT)
    hurt.end(everyone)
    assert hurt.child.returncode == 130
    (line,) = hurt.said
    assert line.startswith("cllm: stopped by SIGINT ")
    assert line.endswith(f"cllm train --resume {run}")
    assert_clean(hurt, run)
    assert RunDirectory.open(run).status().state == "interrupted"


def test_a_worker_that_hangs_does_not_keep_the_parent(
    endless: tuple[Any, Any, Path], assert_clean: Clean
) -> None:
    hurt, everyone, run = endless
    os.kill(hurt.roles()["last"], signal.SIGSTOP)
    time.sleep(0.2)
    hurt.child.terminate()
    hurt.end(everyone)
    assert hurt.child.returncode == 143
    (line,) = hurt.said
    said = re.search(r"after step (\d+); the step that followed was given up; go on", line)
    assert said is not None, line
    assert RunDirectory.open(run).steps()[-1] == int(said[1]) >= 10
    assert_clean(hurt, run)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_a_signal_before_training_leaves_nothing(
    signum: signal.Signals,
    tmp_path: Path,
    process: Callable[..., subprocess.Popen[str]],
    options: Callable[..., list[str]],
    text_of: Callable[..., str],
) -> None:
    data = tmp_path / "text.txt"
    data.write_text(text_of(4_000), encoding="utf-8")
    out, heard = tmp_path / "runs" / "one", partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    # Heard even where these tests are a shell's background job, whose children ignore Ctrl-C.
    child = process("train", "--data", data, *options(), "--out", out, preexec_fn=heard)
    while not list(tmp_path.glob("runs/.tmp-*/*")):
        assert child.poll() is None
        time.sleep(0.002)
    child.send_signal(signum)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 128 + signum, err
    assert err.splitlines()[-1] == f"cllm: stopped by {signum.name}"
    assert "Traceback" not in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["first", "last", "torchrun"])
def test_a_process_is_killed_before_all_have_met(
    victim: str, tmp_path: Path, begin: Begin, arguments: Arguments
) -> None:
    """Those that wait for it are in the middle of a call of torch."""
    run = tmp_path / "run"
    hurt = begin("ddp", *arguments("ddp"), "--out", run)
    hurt.wait(lambda: len(hurt.roles()) == 3)
    everyone, roles = hurt.everyone(), hurt.roles()
    if victim != "torchrun":
        os.kill(roles[victim], signal.SIGSTOP)  # so that it cannot have met the other
        time.sleep(8.0)
    os.kill(roles[victim], signal.SIGKILL)
    hurt.end(everyone)
    assert hurt.child.returncode != 0
    assert len(hurt.said) <= 1, hurt.lines
    assert not run.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "whom", "signum", "said"),
    [
        ("workers", "first", signal.SIGKILL, ""),
        ("workers", "last", signal.SIGKILL, "worker 1 .* was killed by signal 9"),
        ("workers", "first", signal.SIGTERM, "after step 0; the step that followed was given up"),
        ("ddp", "first", signal.SIGKILL, "process 0 of torchrun .* is gone"),
        ("ddp", "last", signal.SIGKILL, "process 1 of torchrun .* is gone"),
        ("ddp", "torchrun", signal.SIGKILL, "torchrun .* is gone"),
        ("ddp", "torchrun", signal.SIGTERM, "stopped by SIGTERM in the middle of a step"),
    ],
)
def test_who_compiles_ends_too(
    name: str,
    whom: str,
    signum: signal.Signals,
    said: str,
    tmp_path: Path,
    begin: Begin,
    arguments: Arguments,
    assert_clean: Clean,
    cache: Path,
) -> None:
    """Compiling takes longer than five seconds, and has processes of its own."""
    shutil.rmtree(cache / "inductor", ignore_errors=True)
    run = tmp_path / "run"
    hurt = begin(name, *arguments(name, train__compile="on"), "--out", run)
    hurt.wait((run / "checkpoints" / "step-00000000").exists)
    hurt.wait(lambda: len(hurt.roles()) == len(hurt.strategy.roles))
    time.sleep(4)
    everyone, roles = hurt.everyone(), hurt.roles()
    assert not (run / "metrics.jsonl").read_text(), "it was too fast to be tested"
    os.kill(roles[whom], signum)
    hurt.end(everyone)
    assert len(hurt.said) == bool(said), hurt.lines
    assert all(re.search(said, line) for line in hurt.said)
    assert_clean(hurt, run)


@pytest.mark.slow
def test_a_limit_on_files_at_a_checkpoint_ends_all_workers(
    endless: tuple[Any, Any, Path], begin: Begin, assert_clean: Clean
) -> None:
    hurt, everyone, run = endless
    resource.prlimit(hurt.child.pid, resource.RLIMIT_FSIZE, (200_000, 200_000))
    hurt.wait(lambda: bool(hurt.said))
    hurt.end(everyone)
    assert hurt.child.returncode == 1
    (line,) = hurt.said
    assert "raise the limit (ulimit -f)" in line
    assert_clean(hurt, run)
    assert RunDirectory.open(run).status().state == "interrupted"
    steps = RunDirectory(run).steps()[-1] + 2
    begin("workers", "--resume", run, "--set", f"train.steps={steps}").finish()

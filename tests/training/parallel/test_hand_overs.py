"""Kills, signals and a full disk: who is left ends, nothing is left over, and the run goes on exactly."""

from __future__ import annotations

import faulthandler
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cllm.core.config import Config
from cllm.store.lock import is_locked
from cllm.store.metrics import read_columns
from cllm.store.run import RunDirectory
from cllm.training.build import build
from cllm.training.parallel import wire
from cllm.training.parallel.crew import Crew

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs memfd, and looks into /proc")

Start = Callable[..., subprocess.Popen[str]]
Pids = Callable[[int], list[int]]
WITHIN = 60.0
"""Seconds in which who is left must have ended: five on a free machine, which `-s` shows."""
DROPOUT = {"model__residual_dropout": 0.1}


@pytest.fixture
def nothing_is_left(
    descendants: Pids, alive: Callable[[int], bool], wait_until: Callable[..., None]
) -> Callable[..., str]:
    """Waits for a process that was hurt, and asserts that soon there is nothing of it; what it said."""
    shared = set(os.listdir("/dev/shm"))

    def check(child: subprocess.Popen[str], below: list[int]) -> str:
        began = time.monotonic()
        _, err = child.communicate(timeout=WITHIN)
        wait_until(lambda: not any(alive(pid) for pid in below), WITHIN)
        print(f"all ended within {time.monotonic() - began:.2f} s")
        assert set(os.listdir("/dev/shm")) <= shared
        assert "Traceback" not in err
        return err

    return check


def kill_and_resume(
    count: int,
    run: Path,
    command: list[object],
    process: Start,
    workers_of: Pids,
    descendants: Pids,
    nothing_is_left: Callable[..., str],
) -> None:
    """Kill the parent or a worker at ``count`` random moments; go on after each."""
    rng, child = random.Random(), process(*command)
    for number in range(count):
        # After its first new step, or, one time in five, wherever it is.
        before = (run / "metrics.jsonl").stat().st_size if (run / "metrics.jsonl").exists() else 0
        anywhere = run.exists() and rng.random() < 0.2
        while not anywhere and not (
            (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size > before
        ):
            assert child.poll() is None, child.communicate()
            time.sleep(0.002)
        time.sleep(rng.uniform(0.0, 2.0 if anywhere else 0.15))
        workers, below = workers_of(child.pid), descendants(child.pid)
        both = [child.pid, *workers]
        victim = both[number % len(both)] if number < 2 else rng.choice(both)
        os.kill(victim, signal.SIGKILL)
        err = nothing_is_left(child, below)
        saved = RunDirectory.open(run).steps()[-1]
        if victim == child.pid:
            assert child.returncode == -signal.SIGKILL
            assert is_locked(run) is False
        else:
            assert child.returncode == 1
            last = err.splitlines()[-1]
            assert last.startswith("cllm: worker 1 (process ")
            assert "--resume" in last
        child = process("train", "--resume", run)
        print(f"kill {number}: {'parent' if victim == child.pid else 'worker'} at {saved}")
    _, err = child.communicate()
    assert child.returncode == 0, err
    for line in err.splitlines():
        if line.startswith("resuming "):
            # Nothing is lost beyond the steps since the last checkpoint.
            assert int(line.rsplit(" ", 1)[1]) == saved


@pytest.mark.parametrize("count", [1, pytest.param(50, marks=pytest.mark.slow)])
def test_random_kills_lose_nothing_but_the_steps_since_the_last_checkpoint(
    count: int,
    tmp_path: Path,
    corpus: Path,
    process: Start,
    options: Callable[..., list[str]],
    assert_same_run: Callable[[Path, Path], None],
    workers_of: Pids,
    descendants: Pids,
    nothing_is_left: Callable[..., str],
) -> None:
    steps = 30 + 20 * count
    changes = {"train__steps": steps, "train__checkpoint_every": 5, "train__eval_every": steps // 2}
    arguments = options(**changes, **DROPOUT, train__parallel__workers=2)
    command = ["train", "--data", corpus, *arguments, "--out"]
    run, straight = tmp_path / "run", tmp_path / "straight"
    kill_and_resume(count, run, [*command, run], process, workers_of, descendants, nothing_is_left)
    child = process(*command, straight)
    _, err = child.communicate()
    assert child.returncode == 0, err
    assert_same_run(run, straight)
    status = RunDirectory.open(run).status()
    assert status.state == "finished"
    assert len(status.sessions) > 1
    assert len(read_columns(run / "metrics.jsonl", "train")["loss"]) == steps


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_a_signal_to_the_whole_group_is_the_parents(
    signum: signal.Signals,
    tmp_path: Path,
    corpus: Path,
    process: Start,
    options: Callable[..., list[str]],
    wait_until: Callable[..., None],
    descendants: Pids,
    workers_of: Pids,
    nothing_is_left: Callable[..., str],
) -> None:
    """As a terminal sends Ctrl-C, and a supervisor SIGTERM."""
    changes = {"train__steps": 100_000, "train__checkpoint_every": 50_000}
    changes |= {"train__eval_every": 50_000}
    run, arguments = tmp_path / "run", options(**changes, train__parallel__workers=2)
    child = process("train", "--data", corpus, *arguments, "--out", run, start_new_session=True)
    wait_until(lambda: bool(workers_of(child.pid)))
    below = descendants(child.pid)
    if signum == signal.SIGTERM:
        wait_until(lambda: (run / "metrics.jsonl").exists())
    os.killpg(child.pid, signum)  # SIGINT: while the workers still start
    err = nothing_is_left(child, below)
    assert child.returncode == 128 + signum
    (last,) = [line for line in err.splitlines() if line.startswith("cllm: ")]
    assert last.startswith(f"cllm: stopped by {signum.name} ")
    assert last.endswith(f"cllm train --resume {run}")
    assert RunDirectory.open(run).status().state == "interrupted"
    assert is_locked(run) is False


def test_a_worker_that_hangs_does_not_keep_the_parent(
    tmp_path: Path,
    corpus: Path,
    process: Start,
    options: Callable[..., list[str]],
    wait_until: Callable[..., None],
    descendants: Pids,
    workers_of: Pids,
    nothing_is_left: Callable[..., str],
) -> None:
    changes = {"train__steps": 100_000, "train__checkpoint_every": 10, "train__eval_every": 50_000}
    run, arguments = tmp_path / "run", options(**changes, train__parallel__workers=2)
    child = process("train", "--data", corpus, *arguments, "--out", run)
    wait_until(lambda: (run / "checkpoints" / "step-00000010").exists())
    (worker,) = workers_of(child.pid)
    os.kill(worker, signal.SIGSTOP)
    time.sleep(0.2)
    child.terminate()
    err = nothing_is_left(child, [worker])
    assert child.returncode == 143
    said = re.search(r"after step (\d+); the step that followed was given up; go on", err)
    assert said is not None, err
    assert RunDirectory.open(run).steps()[-1] == int(said[1]) >= 10


def test_sigterm_before_training_leaves_nothing(
    tmp_path: Path, process: Start, options: Callable[..., list[str]], text_of: Callable[..., str]
) -> None:
    data = tmp_path / "text.txt"
    data.write_text(text_of(4_000), encoding="utf-8")
    child = process("train", "--data", data, *options(), "--out", tmp_path / "runs" / "one")
    while not list(tmp_path.glob("runs/.tmp-*/*")):
        assert child.poll() is None
        time.sleep(0.002)
    child.terminate()
    _, err = child.communicate(timeout=WITHIN)
    assert child.returncode == 143, err
    assert err.splitlines()[-1] == "cllm: stopped by SIGTERM"
    assert "Traceback" not in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_compilers_of_a_killed_parent_end_too(
    tmp_path: Path,
    corpus: Path,
    process: Start,
    options: Callable[..., list[str]],
    wait_until: Callable[..., None],
    workers_of: Pids,
    descendants: Pids,
    nothing_is_left: Callable[..., str],
    cache: Path,
) -> None:
    """Compiling takes longer than five seconds, and has processes of its own."""
    for name in ("SIGKILL", "SIGTERM"):
        shutil.rmtree(cache / "inductor", ignore_errors=True)
        run, changes = tmp_path / name, {"train__compile": "on", "train__parallel__workers": 2}
        child = process("train", "--data", corpus, *options(**changes), "--out", run)
        wait_until(lambda c=child: bool(workers_of(c.pid)))  # type: ignore[misc]
        time.sleep(8)
        below = descendants(child.pid)
        assert not (run / "checkpoints" / "step-00000004").exists(), "it was too fast to be tested"
        child.send_signal(signal.Signals[name])
        err = nothing_is_left(child, below)
        assert child.returncode == {"SIGKILL": -9, "SIGTERM": 143}[name], err
        if name == "SIGTERM":
            assert "after step 0; the step that followed was given up" in err.splitlines()[-1]


def full_disk(run: Path) -> list[str]:
    """A command before ``cllm`` that gives ``run`` a file system of its own of 8 MB; empty without."""
    if shutil.which("unshare") is None:
        return []
    before = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = f'mount -t tmpfs -o size=8m none "{run}" && exec "$@"'
    trial = subprocess.run([*before, mount, "sh", "true"], capture_output=True, check=False)
    return [*before, mount, "sh"] if trial.returncode == 0 else []


def test_a_disk_that_is_full_at_a_checkpoint_ends_all_workers(
    tmp_path: Path, corpus: Path, cache: Path, options: Callable[..., list[str]]
) -> None:
    """A real file system without space; what was saved before is whole."""
    run = tmp_path / "run"
    run.mkdir()
    before = full_disk(run)
    if not before:
        pytest.skip("no file system may be mounted here")
    changes = {"train__checkpoint_every": 3, "train__steps": 60, "train__keep_last": 50}
    arguments = ["train", "--data", corpus, *options(**changes, train__parallel__workers=2)]
    python = [sys.executable, "-m", "cllm"]
    # In one namespace: train until it is full, make room, and go on.
    script = (
        'PY="$1"; shift; "$PY" -m cllm "$@"; echo "code $?" >&2; ls "$RUN/checkpoints" >&2; '
        'rm -rf "$RUN/checkpoints/step-00000000"; '
        '"$PY" -m cllm train -q --resume "$RUN" --set train.keep_last=1; echo "code $?" >&2'
    )
    done = subprocess.run(
        [*before, "sh", "-c", script, "sh", python[0], *map(str, arguments), "--out", str(run)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"RUN": str(run), "CLLM_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
    )
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    first = lines.index("code 1")
    assert "the disk is full; free some space" in lines[first - 1]
    assert "step-00000003" in lines[first + 1 :]
    assert not [line for line in lines[first + 1 :] if ".tmp-" in line]
    assert lines[-1] == "code 0"


@pytest.mark.slow
def test_a_limit_on_files_at_a_checkpoint_ends_all_workers(
    tmp_path: Path,
    corpus: Path,
    process: Start,
    options: Callable[..., list[str]],
    wait_until: Callable[..., None],
    descendants: Pids,
    nothing_is_left: Callable[..., str],
) -> None:
    changes = {"train__steps": 4000, "train__checkpoint_every": 3}
    run, arguments = tmp_path / "run", options(**changes, train__parallel__workers=2)
    child = process("train", "--data", corpus, *arguments, "--out", run)
    wait_until(lambda: (run / "checkpoints" / "step-00000003").exists())
    below = descendants(child.pid)
    resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (200_000, 200_000))
    err = nothing_is_left(child, below)
    assert child.returncode == 1
    assert "raise the limit (ulimit -f)" in err.splitlines()[-1]
    assert RunDirectory.open(run).status().state == "interrupted"
    again = process(
        "train", "--resume", run, "--set", f"train.steps={RunDirectory(run).steps()[-1] + 2}"
    )
    _, err = again.communicate()
    assert again.returncode == 0, err


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
    for name in ("begin", "results"):
        monkeypatch.setattr(Crew, name, module.delayed(getattr(Crew, name), rng))
    hurried = weights()
    assert all(torch.equal(one, other) for one, other in zip(calm, hurried, strict=True))
    assert not torch.equal(calm[0], calm[-1])

"""Each way of training in several processes against each fault: who is left ends soon, with one line, and
leaves nothing; the run goes on to the bits of one that nothing happened to."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cllm.store.run import RunDirectory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

Same = Callable[[Path, Path], None]
Begin = Callable[..., Any]
STEPS, STEP = 150, "step-00000010"
TORCHRUN = ("ddp", "fsdp", "1f1b", "zero-bubble")
VICTIMS = {"delayed": ("first",), "workers": ("first", "last")}
VICTIMS |= dict.fromkeys(TORCHRUN, ("first", "last", "torchrun"))
QUICK = {
    ("workers", "SIGKILL last"),
    ("workers", "SIGTERM all"),
    ("delayed", "SIGTERM one"),
}
ENDS_QUICKLY = [("ddp", "SIGKILL torchrun"), ("fsdp", "SIGKILL last"), ("1f1b", "SIGTERM one")]
"""Of torchrun's, whose starts take long, those that are always tested: without the run that goes on."""
CELLS = [(name, f"SIGKILL {victim}") for name, victims in VICTIMS.items() for victim in victims]
CELLS += [(name, how) for name in VICTIMS for how in ("SIGTERM one", "SIGTERM all", "SIGINT group")]


def marked(cells: list[tuple[str, ...]]) -> list[Any]:
    """The cells, slow but for a few."""
    slow = pytest.mark.slow
    return [pytest.param(*c, marks=() if c in QUICK else slow, id="-".join(c)) for c in cells]


def hit(hurt: Any, signum: signal.Signals, whom: str) -> None:
    """Send a signal: ``one`` is who was started, ``group`` its group, as by Ctrl-C, and ``all`` each
    process, as a supervisor does."""
    if whom == "group":
        os.killpg(hurt.child.pid, signum)
    elif whom == "all":
        for pid in reversed(hurt.everyone()):
            os.kill(pid, signum)
    else:
        os.kill(hurt.child.pid if whom == "one" else hurt.roles()[whom], signum)


def expected(hurt: Any, roles: dict[str, int], signum: signal.Signals, whom: str) -> str:
    """What must be said; nothing where nobody is left to say it."""
    if signum != signal.SIGKILL:
        return rf"cllm: stopped by {signum.name} after step \d+; go on with: cllm train --resume .+"
    pid = roles[whom]
    if not hurt.strategy.torchrun:
        killed = rf"cllm: worker 1 \(process {pid}\) was killed by signal 9; .*--resume"
        return killed if whom == "last" else ""
    if whom == "torchrun":
        return rf"cllm: torchrun \(pid {pid}\) is gone; .*--resume"
    rank = {"first": 0, "last": 1}[whom]
    return rf"cllm: process {rank} of torchrun \(pid {pid}\) is gone; .*--resume"


@pytest.fixture
def broken(
    tmp_path: Path,
    begin: Begin,
    arguments: Callable[..., list[object]],
    assert_clean: Callable[[Any, Path], None],
) -> Callable[[str, str], Path]:
    """Makes a run and a fault in it, after which all must have ended as they should."""

    def make(name: str, fault: str) -> Path:
        run, (signame, whom) = tmp_path / "run", fault.split()
        signum = signal.Signals[signame]
        hurt = begin(name, *arguments(name), "--out", run)
        hurt.wait((run / "checkpoints" / STEP).exists)
        everyone, roles = hurt.everyone(), hurt.roles()
        assert set(roles) == set(VICTIMS[name])
        hit(hurt, signum, whom)
        hurt.end(everyone)
        assert hurt.child.returncode != 0
        said = expected(hurt, roles, signum, whom)
        assert len(hurt.said) == bool(said), hurt.said
        for line in hurt.said:
            assert re.match(said, line), line
        assert_clean(hurt, run)
        assert RunDirectory.open(run).status().state == "interrupted"
        assert RunDirectory.open(run).steps()[-1] < STEPS, "it was too fast to be tested"
        return run

    return make


@pytest.mark.parametrize(("name", "fault"), ENDS_QUICKLY)
def test_who_is_left_ends(name: str, fault: str, broken: Callable[[str, str], Path]) -> None:
    assert broken(name, fault).is_dir()


@pytest.mark.parametrize(("name", "fault"), marked(CELLS))
def test_who_is_left_ends_and_the_run_goes_on(
    name: str,
    fault: str,
    broken: Callable[[str, str], Path],
    begin: Begin,
    assert_same_run: Same,
    straight_of: Callable[[str], Path],
) -> None:
    run = broken(name, fault)
    last = RunDirectory.open(run).steps()[-1]
    again = begin(name, "--resume", run)
    again.finish()
    assert f"resuming {run} at step {last}" in again.lines
    assert_same_run(run, straight_of(name))


@pytest.mark.parametrize(
    "name", [n if n == "workers" else pytest.param(n, marks=pytest.mark.slow) for n in VICTIMS]
)
def test_a_full_disk_at_a_checkpoint(
    name: str,
    tmp_path: Path,
    begin: Begin,
    arguments: Callable[..., list[object]],
    small_disk: Callable[[Path, int], tuple[int, tuple[str, ...]]],
    assert_clean: Callable[[Any, Path], None],
    assert_same_run: Same,
    straight_of: Callable[[str], Path],
) -> None:
    """A real file system without space: what was saved before is whole, and goes on once there is some."""
    run = tmp_path / "run"
    run.mkdir()
    holder, before = small_disk(run, 8)
    seen = Path(f"/proc/{holder}/root{run}")
    hurt = begin(name, *arguments(name), "--out", run, before=before)
    hurt.wait((seen / "checkpoints" / STEP).exists)
    everyone = hurt.everyone()
    hurt.wait(lambda: any("the disk is full" in line for line in hurt.lines))
    hurt.end(everyone)
    assert hurt.child.returncode == 1
    (line,) = hurt.said
    assert "the disk is full; free some space" in line
    assert_clean(hurt, seen)
    assert not list(seen.glob("checkpoints/.tmp-*"))
    steps = RunDirectory.open(seen).steps()
    assert 10 <= steps[-1] < STEPS
    larger = ["mount", "-o", "remount,size=200m", str(run)]
    subprocess.run([*before, *larger], check=True)
    again = begin(name, "--resume", run, before=before)
    again.finish()
    assert f"resuming {run} at step {steps[-1]}" in again.lines
    assert_same_run(seen, straight_of(name))

"""A training of several processes or threads, looked at from outside while it is hurt."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cllm.store.lock import is_locked

WITHIN = 5.0
"""Seconds in which who is left must have ended, besides those that it waited for a core."""
AT_MOST = 90.0
"""Seconds after which it has failed to, however busy the machine is."""

RUNS: dict[str, Any] = {
    "train__steps": 150,
    "train__checkpoint_every": 10,
    "train__eval_every": 75,
    "train__keep_last": 50,
    "model__residual_dropout": 0.1,
    "model__embedding_dropout": 0.1,
}


@dataclass(frozen=True)
class Strategy:
    """A way of training: its settings, and whether torchrun starts it, in two processes."""

    settings: dict[str, Any]
    torchrun: bool = True

    @property
    def roles(self) -> tuple[str, ...]:
        """The processes that it has."""
        if self.torchrun:
            return ("first", "last", "torchrun")
        return ("first", "last") if "train__parallel__workers" in self.settings else ("first",)


STAGES = {"train__pipeline__mode": "stages"}
STRATEGIES = {
    "workers": Strategy({"train__parallel__workers": 2}, torchrun=False),
    "delayed": Strategy({"train__pipeline__mode": "delayed"}, torchrun=False),
    "ddp": Strategy({}),
    "fsdp": Strategy({"train__parallel__strategy": "fsdp"}),
    "1f1b": Strategy(STAGES | {"model__n_layers": 2}),
    "zero-bubble": Strategy(
        STAGES | {"model__n_layers": 4, "train__pipeline__schedule": "zero-bubble"}
    ),
}


def children(pid: int) -> list[int]:
    """Processes below a process, its children's children too."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    found = [int(word) for word in text.split()]
    return found + [below for child in found for below in children(child)]


def is_alive(pid: int) -> bool:
    """Whether there is such a process, and it is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def waits(pid: int) -> dict[int, float]:
    """Seconds that each thread of a process has waited for a core."""
    found = {}
    with suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with suppress(OSError):
                text = Path(f"/proc/{pid}/task/{thread}/schedstat").read_text()
                found[int(thread)] = int(text.split()[1]) / 1e9
    return found


class Hurt:
    """A started training, and what becomes of it."""

    def __init__(self, child: subprocess.Popen[str], strategy: Strategy, ranks: Any) -> None:
        self.child, self.strategy, self._ranks = child, strategy, ranks
        self.lines: list[str] = []
        self._readers = [
            threading.Thread(target=self._read, args=[pipe], daemon=True)
            for pipe in (child.stdout, child.stderr)
            if pipe is not None
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, pipe: Any) -> None:
        for line in pipe:
            self.lines.append(line.rstrip("\n"))

    @property
    def said(self) -> list[str]:
        """The lines that are ours, and no progress."""
        return [line for line in self.lines if line.startswith("cllm: ")]

    def roles(self) -> dict[str, int]:
        """The process ids of those that are there."""
        found = {"torchrun" if self.strategy.torchrun else "first": self.child.pid}
        if self.strategy.torchrun:
            names = {0: "first", 1: "last"}
            with suppress(FileNotFoundError):
                found |= {names[rank]: pid for rank, pid in self._ranks(self.child).items()}
        for pid in children(self.child.pid):
            with suppress(OSError):
                if b"parallel.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found["last"] = pid
        return found

    def wait(self, true: Callable[[], bool]) -> None:
        """Until it is true, which must come to be before the training has ended."""
        end = time.monotonic() + 2 * AT_MOST
        while not true():
            if self.child.poll() is not None:
                self._hear_out()
                assert true(), "\n".join(self.lines)
            assert time.monotonic() < end, "it did not happen"
            time.sleep(0.002)

    def everyone(self) -> list[int]:
        """All its processes."""
        return [self.child.pid, *children(self.child.pid)]

    def end(self, everyone: list[int]) -> float:
        """Wait until all have ended, who must be fast; the seconds that they took, waits for a core
        left out."""
        began, before, after = time.monotonic(), dict[int, float](), dict[int, float]()
        while any(map(is_alive, everyone)):
            for pid in everyone:
                after |= waits(pid)
            before = after | before
            if (took := time.monotonic() - began) > AT_MOST:
                raise AssertionError(f"still there after {took:.0f} s: {self.lines}")
            self.child.poll()
            time.sleep(0.01)
        took = time.monotonic() - began
        waited = sum(after[thread] - before[thread] for thread in after)
        print(f"ended after {took:.2f} s, {waited:.2f} s of waiting for cores among them")
        assert took - waited <= WITHIN, self.lines
        self._hear_out()
        return took - waited

    def finish(self) -> None:
        """Wait for its good end."""
        self._hear_out()
        assert self.child.returncode == 0, self.lines

    def _hear_out(self) -> None:
        self.child.wait()
        for reader in self._readers:
            reader.join()


@pytest.fixture
def begin(
    process: Callable[..., subprocess.Popen[str]],
    torchrun: Callable[..., subprocess.Popen[str]],
    ranks: Any,
) -> Callable[..., Hurt]:
    """Starts ``cllm train ARGUMENTS…`` by a strategy's name."""

    def start(name: str, *arguments: object, before: tuple[str, ...] = ()) -> Hurt:
        strategy = STRATEGIES[name]
        if strategy.torchrun:
            child = torchrun(2, "-m", "cllm", "train", *arguments, before=before)
        else:
            child = process("train", *arguments, before=before, start_new_session=True)
        return Hurt(child, strategy, ranks)

    return start


@pytest.fixture(scope="session")
def unbroken() -> dict[str, Path]:
    """Runs that nothing happened to, by their strategy, once they were made."""
    return {}


@pytest.fixture
def straight_of(
    begin: Callable[..., Hurt],
    unbroken: dict[str, Path],
    arguments: Callable[[str], list[object]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Path]:
    """The run of a strategy that nothing happens to."""

    def make(name: str) -> Path:
        if name not in unbroken:
            run = tmp_path_factory.mktemp("straight") / name
            begin(name, *arguments(name), "--out", run).finish()
            unbroken[name] = run
        return unbroken[name]

    return make


@pytest.fixture
def arguments(corpus: Path, options: Callable[..., list[str]]) -> Callable[..., list[object]]:
    """Arguments of ``cllm train`` for a strategy, with some settings changed."""

    def make(name: str, **changes: Any) -> list[object]:
        return ["--data", corpus, *options(**RUNS | STRATEGIES[name].settings | changes)]

    return make


@pytest.fixture
def assert_clean() -> Iterator[Callable[[Hurt, Path], None]]:
    """Asserts that of a training that ended nothing is left but its run, and that it broke in words."""
    shared = set(os.listdir("/dev/shm"))

    def check(hurt: Hurt, run: Path) -> None:
        assert set(os.listdir("/dev/shm")) <= shared
        assert is_locked(run) is False
        ours = [line for line in hurt.lines if re.search(r'File ".*[/\\]cllm[/\\]', line)]
        assert not ours, "\n".join(hurt.lines)

    return check


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[Path, int], tuple[int, tuple[str, ...]]]]:
    """Makes a file system of so many MB on a directory, for who is started behind the words it returns;
    others see it below ``/proc/PID/root``. Skips where none may be made."""
    if shutil.which("unshare") is None or shutil.which("nsenter") is None:
        pytest.skip("needs unshare and nsenter")
    holders: list[subprocess.Popen[str]] = []

    def make(place: Path, size: int) -> tuple[int, tuple[str, ...]]:
        mount = f'mount -t tmpfs -o size={size}m none "{place}" && echo made && exec sleep 100000'
        command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount]
        holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        holders.append(holder)
        assert holder.stdout is not None
        if holder.stdout.readline() != "made\n":
            pytest.skip("no file system may be mounted here")
        enter = ("nsenter", f"--target={holder.pid}", "--user", "--mount", "--preserve-credentials")
        return holder.pid, (*enter, f"--wdns={tmp_path}")

    yield make
    for holder in holders:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()

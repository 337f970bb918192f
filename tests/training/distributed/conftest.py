"""torchrun as a user starts it, on this machine, without a process that outlives its test."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest


def _ranks(agent: subprocess.Popen[str]) -> dict[int, int]:
    """Process ids of the processes that a torchrun has started, by rank."""
    found = {}
    text = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text()
    for pid in map(int, text.split()):
        with suppress(OSError):
            for pair in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                if pair.startswith(b"RANK="):
                    found[int(pair[5:])] = pid
    return found


def _alive(pid: int) -> bool:
    """Whether there is such a process, and it is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture(scope="session")
def ranks() -> Callable[[subprocess.Popen[str]], dict[int, int]]:
    """``_ranks``."""
    return _ranks


@pytest.fixture(scope="session")
def alive() -> Callable[[int], bool]:
    """``_alive``."""
    return _alive


@pytest.fixture
def torchrun(cache: Path, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts ``torchrun OPTIONS… ARGUMENTS…``; all that it started ends with the test."""
    started: list[subprocess.Popen[str]] = []
    mine = {"CLLM_CACHE": str(cache), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    environment = {k: v for k, v in os.environ.items() if k != "CLLM_DEBUG"} | mine

    def start(
        processes: int, *arguments: object, options: tuple[str, ...] = ("--standalone",), **how: Any
    ) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "torch.distributed.run", *options]
        command += ["--nproc-per-node", str(processes), *map(str, arguments)]
        child = subprocess.Popen(
            [*how.pop("before", []), *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=tmp_path,
            env=environment | how.pop("environ", {}),
            start_new_session=True,
            **how,
        )
        started.append(child)
        return child

    yield start
    for child in started:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        if child.stdout is not None and not child.stdout.closed:
            child.communicate()


@pytest.fixture(scope="session")
def wait_for() -> Callable[[Path, subprocess.Popen[str]], None]:
    """Waits until a path is there while a process runs."""

    def wait(path: Path, child: subprocess.Popen[str]) -> None:
        end = time.monotonic() + 120
        while not path.exists():
            assert child.poll() is None, child.communicate()[0]
            assert time.monotonic() < end, f"{path} did not appear"
            time.sleep(0.005)

    return wait

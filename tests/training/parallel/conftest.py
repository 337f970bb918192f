"""Processes of a run in training, looked at from outside."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest


def cmdline(pid: int) -> bytes:
    """The command of a process; empty where it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def _descendants(pid: int) -> list[int]:
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    found = [int(word) for word in text.split()]
    return found + [below for child in found for below in _descendants(child)]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _wait_until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


@pytest.fixture(scope="session")
def descendants() -> Callable[[int], list[int]]:
    """Processes below a process, its children's children too."""
    return _descendants


@pytest.fixture(scope="session")
def workers_of() -> Callable[[int], list[int]]:
    """The workers of a process."""
    return lambda pid: [p for p in _descendants(pid) if b"parallel.worker" in cmdline(p)]


@pytest.fixture(scope="session")
def alive() -> Callable[[int], bool]:
    """Whether there is such a process, and it is no zombie."""
    return _alive


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., None]:
    """Watches for something to come true, for at most 60 s (or what is said)."""
    return _wait_until

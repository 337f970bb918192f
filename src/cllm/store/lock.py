"""One process at a time trains in a run: the file ``lock`` names it.

The file is created with O_EXCL and holds host, process id and start time. A killed process leaves it
behind; the next one sees that its owner is dead, says so and takes it over.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cllm.core.atomic import clear_errors
from cllm.core.errors import UserError
from cllm.core.process import Process, is_running, this_process

NAME = "lock"


@contextmanager
def locked(run: Path, say: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """Hold the lock of the run directory ``run``.

    ``say`` is told in one line when a dead process's lock is taken over. Raises ``UserError`` if a
    living process holds it, or one on another machine, which cannot be asked.
    """
    path = run / NAME
    with clear_errors(path), _one_at_a_time(run):
        stale = _judge(path, run)
        if stale is not None:
            say(stale)
            path.unlink(missing_ok=True)
        _create(path)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def holder(run: Path) -> Process | None:
    """The process named in the lock of ``run``, alive or not; ``None`` without a (readable) lock."""
    try:
        return Process.from_json(json.loads((run / NAME).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def is_locked(run: Path) -> bool:
    """Whether a process that lives (or may live, on another machine) holds the lock of ``run``."""
    owner = holder(run)
    return owner is not None and is_running(owner) is not False


def _judge(path: Path, run: Path) -> str | None:
    """``None`` without a lock, the line to say if its owner is dead; ``UserError`` if it is not."""
    if not path.exists():
        return None
    owner = holder(run)
    if owner is None:  # killed between creating and filling it
        return f"{run}: an empty lock of a killed process was removed"
    alive = is_running(owner)
    if alive:
        raise UserError(
            f"{run} is being trained by process {owner.pid}; wait for it, or train into another --out"
        )
    if alive is None:
        raise UserError(
            f"{run} is locked by process {owner.pid} on the machine {owner.host!r}; if that one no "
            f"longer trains, delete {path}"
        )
    return f"{run}: process {owner.pid}, which trained here, was killed; its lock was removed"


def _create(path: Path) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            json.dump(this_process().to_json(), file)
    except FileExistsError:
        raise UserError(f"another process has just begun to train in {path.parent}") from None


@contextmanager
def _one_at_a_time(run: Path) -> Iterator[None]:
    """Where the system can lock a directory, let one process at a time judge and take over.

    Without it two processes that find the same dead owner could each remove the other's fresh lock.
    """
    try:
        import fcntl
    except ImportError:  # Windows: O_EXCL alone
        yield
        return
    descriptor = os.open(run, os.O_RDONLY)
    try:
        with suppress(OSError):  # network file systems without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)

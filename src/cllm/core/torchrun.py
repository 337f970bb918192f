"""What torchrun tells each process that it starts: which one it is, and of how many."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import FrameType
from typing import NoReturn

from cllm.core.process import host_name, start_time

_LOOK = 0.25
"""Seconds between two looks whether torchrun is still there."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A process's place among those of one ``torchrun``."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    """Processes on this machine."""
    job: str
    """The same for all processes of one ``torchrun``, and again after it has restarted them."""
    attempt: int = 0
    """How often it has restarted them."""

    @property
    def is_first(self) -> bool:
        """Whether this process leads: it alone reads the text, writes the run and speaks."""
        return self.rank == 0


def launched(environ: Mapping[str, str] = os.environ) -> Launch | None:
    """This process's place, or ``None`` where no ``torchrun`` started it."""
    if "TORCHELASTIC_RUN_ID" not in environ or "RANK" not in environ:
        return None
    job = environ["TORCHELASTIC_RUN_ID"]
    if job == "none":  # the usual one without --rdzv-id: told apart by the agent's process
        job = f"{host_name()}:{os.getppid()}:{start_time(os.getppid())}"
    return Launch(
        rank=int(environ["RANK"]),
        size=int(environ["WORLD_SIZE"]),
        local_rank=int(environ["LOCAL_RANK"]),
        local_size=int(environ["LOCAL_WORLD_SIZE"]),
        job=job,
        attempt=int(environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
    )


def leave(code: int) -> NoReturn:
    """End this process at once: torch's process groups have been seen to wait for ever when they are taken
    down with the interpreter."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@cache
def end_with_torchrun() -> int:
    """From now on a thread ends this process soon after its torchrun is gone; returns torchrun's pid.

    Torchrun gives each process a session of its own, so that nothing else would end them: killed, it
    leaves a training behind that goes on unseen. One process of a machine says what happened.
    """
    agent = os.getppid()
    threading.Thread(target=_watch, args=[agent], name="torchrun", daemon=True).start()
    return agent


def leave_the_word_to_the_watch() -> None:
    """Where others have ended because torchrun is gone, wait for the thread that says so and ends this
    process."""
    if os.getppid() != end_with_torchrun():
        threading.Event().wait()


def _watch(agent: int) -> None:
    while os.getppid() == agent:
        time.sleep(_LOOK)
    launch = launched()
    if launch is not None and launch.local_rank == 0:
        print(
            f"cllm: torchrun (pid {agent}) is gone; go on from the last checkpoint with --resume",
            file=sys.stderr,
        )
    leave(1)


def leave_on_signals() -> None:
    """Before this process has joined the others, Ctrl-C and SIGTERM end it; the first says so."""

    def stop(signum: int, frame: FrameType | None) -> None:
        leave(128 + signum)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, stop)


def leave_signals_to_the_first() -> None:
    """Ctrl-C and SIGTERM reach every process: the first decides what becomes of the run, and tells the
    others."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)

"""What torchrun tells each process that it starts: which one it is, and of how many."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from cllm.core.process import host_name, start_time


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


def leave_signals_to_the_first() -> None:
    """Ctrl-C and SIGTERM reach every process: the first decides what becomes of the run, and tells the
    others."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)

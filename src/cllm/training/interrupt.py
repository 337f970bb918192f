"""Ctrl-C and SIGTERM while training: finish the step, save, and say how to go on."""

from __future__ import annotations

import shlex
import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from cllm.core.errors import UserError
from cllm.core.torchrun import launched


class InterruptedRunError(UserError):
    """Training was stopped by a signal, after a checkpoint; the exit code is 128 + the signal's."""

    def __init__(self, text: str, signum: int) -> None:
        super().__init__(text)
        self.exit_code = 128 + signum


class Interrupt:
    """Holds a signal until the loop asks for it; a second one ends the process at once (not under
    torchrun, which sends on what the terminal has sent already).

    Outside the main thread (where Python takes no signal handlers) it does nothing.
    """

    def __init__(self) -> None:
        self.pending = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._before[signum] = signal.signal(signum, self._hold)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _hold(self, signum: int, frame: FrameType | None) -> None:
        self.pending = signum
        if launched() is None:
            signal.signal(signum, self._before[signum])

    def raise_pending(self, step: int, run: Path) -> None:
        """Raise ``InterruptedRunError`` for the held signal, naming the command that goes on."""
        name = signal.Signals(self.pending).name
        text = f"stopped by {name} after step {step}; go on with: "
        raise InterruptedRunError(
            f"{text}cllm train --resume {shlex.quote(str(run))}", self.pending
        )

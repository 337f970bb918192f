"""Ctrl-C and SIGTERM while training: finish the step, save, and say how to go on."""

from __future__ import annotations

import shlex
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

from cllm.core.errors import UserError
from cllm.core.torchrun import launched

PATIENCE = 3.0
"""Seconds after a signal in which the step at hand (a validation, a compilation) may come to its end."""

LIMIT = 1.0
"""Seconds more under torchrun, where a step cannot be given up alone, and the process ends in the middle of
it; twice the time of the last step, if that is more."""
LONGEST = 25.0
"""At most as many: torchrun kills after thirty."""

AGAIN = 1.0
"""Seconds after which what was given up and went on all the same is given up once more."""


class InterruptedRunError(UserError):
    """Training was stopped by a signal, after a checkpoint; the exit code is 128 + the signal's."""

    def __init__(self, text: str, signum: int) -> None:
        super().__init__(text)
        self.exit_code = 128 + signum


class GivenUpError(BaseException):
    """What is at work is given up. Raised by a signal's handler, wherever the main thread is; no
    ``Exception``, as compilers wrap these in errors of their own, or swallow them."""


class Interrupt:
    """Holds a signal until the loop asks for it; a second one ends the process at once (not under
    torchrun, which sends on what the terminal has sent already).

    Where the loop does not ask within ``patience`` seconds, as in a long compilation, what it does is
    given up: ``GivenUpError`` is raised in the middle of it, once a second until it has come through, and
    leaves the block as an ``InterruptedRunError``.
    Under torchrun, where no process can give up alone, it is raised by ``giving_up`` only, and a step that
    does not end is left: ``leave`` is called with the error, by another thread.
    Outside the main thread (where Python takes no signal handlers) it does nothing, and on Windows there
    is no bound.
    """

    def __init__(self, run: Path | None = None, patience: float = PATIENCE) -> None:
        self.pending = 0
        self._run, self._patience = run, patience
        self._before: dict[int, Any] = {}
        self._timed = hasattr(signal, "setitimer")
        self._saving = self._whole = self._due = self._over = False
        self._lost: Callable[[], UserError] | None = None
        self.leave: Callable[[InterruptedRunError], None] | None = None
        self.last_step = 0.0
        """Seconds that the last step took."""
        self._asked = False
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._before[signum] = signal.signal(signum, self._hold)
            if self._timed:
                self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._give_up)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._lock:
            self._over = True
        self._stop_waiting()
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        if isinstance(error, GivenUpError):
            lost = self._lost if not self.pending else None
            if lost is not None:
                raise lost() from None
            raise self._error("in the middle of a step, which is lost") from None

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Within it a checkpoint is written, which may take as long as it takes."""
        self._saving = True
        self._stop_waiting()
        try:
            yield
        finally:
            self._saving = False

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within it nothing is given up: it takes a moment, and half of it would be worse than none."""
        self._whole = True
        try:
            yield
        finally:
            self._whole = False
        if (
            self._due and not self.pending
        ):  # a signal is given up once more, or asked for before that
            raise GivenUpError

    def giving_up(self, call: Callable[[float], None]) -> Callable[[float], None]:
        """``call``, made where all processes of a torchrun wait for the first, which may give up there."""

        def made(amount: float) -> None:
            call(amount)
            if self._asked and not self._over:
                raise GivenUpError

        return made

    def end_with(self, error: Callable[[], UserError]) -> None:
        """From another thread: give up what the main thread does, and leave the block with ``error()``,
        which is called there. Nothing comes of it while a checkpoint is written, or on Windows."""
        main = threading.main_thread().ident
        with self._lock:
            if signal.SIGALRM in self._before and not self._over and main is not None:
                self._lost = error
                signal.pthread_kill(main, signal.SIGALRM)

    def raise_pending(self, step: int, besides: str = "") -> NoReturn:
        """Raise ``InterruptedRunError`` for the held signal, naming the command that goes on.

        ``besides``: what else is to be said of that step.
        """
        raise self._error(f"after step {step}{besides}")

    def _hold(self, signum: int, frame: FrameType | None) -> None:
        known, self.pending = self.pending, signum
        if launched() is not None:  # the processes agree on where to stop
            if self.leave is not None and not known:
                threading.Thread(target=self._leave_in_time, name="interrupt", daemon=True).start()
            return
        signal.signal(signum, self._before[signum])
        if self._timed and not self._saving:
            signal.setitimer(signal.ITIMER_REAL, self._patience, AGAIN)

    def _leave_in_time(self) -> None:
        time.sleep(self._patience)
        self._asked = True
        time.sleep(min(max(LIMIT, 2 * self.last_step - self._patience), LONGEST))
        if self.leave is not None and not self._saving and not self._over:
            self.leave(self._error("in the middle of a step, which is lost"))

    def _give_up(self, signum: int, frame: FrameType | None) -> None:
        if self._over or self._saving:
            return
        if self._whole:
            self._due = True
            return
        # What is given up while a backward pass is traced for the compiler is no error in it.
        warnings.filterwarnings("ignore", "Error detected in", UserWarning)
        raise GivenUpError

    def _stop_waiting(self) -> None:
        if self._timed and self.pending:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _error(self, when: str) -> InterruptedRunError:
        name = signal.Signals(self.pending).name
        how = ""
        if self._run is not None:
            how = f"; go on with: cllm train --resume {shlex.quote(str(self._run))}"
        return InterruptedRunError(f"stopped by {name} {when}{how}", self.pending)

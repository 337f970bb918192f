"""Work that needs not be waited for: the log's lines and checkpoints, written beside the steps."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import Queue
from typing import Any

Task = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class Background:
    """A thread that does what it is handed, one after the other and in that order.

    What a task raises is raised by the next ``hand_over`` or ``wait``; what was handed over after that task
    is not done. ``threaded=False``: the caller does each at once. The thread begins with the first task and
    ends with ``close``.
    """

    def __init__(self, *, threaded: bool) -> None:
        self.threaded = threaded
        self._tasks: Queue[Task | None] = Queue()
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def hand_over(self, call: Callable[..., Any], *arguments: Any, **named: Any) -> None:
        """Have ``call`` done. What it is given must not change any more."""
        self._raise()
        if not self.threaded:
            call(*arguments, **named)
            return
        if self._thread is None:
            # A daemon: where the process ends all the same, what is written is whole or not there.
            self._thread = threading.Thread(target=self._work, name="background", daemon=True)
            self._thread.start()
        self._tasks.put((call, arguments, named))

    def wait(self) -> None:
        """Wait until all is done."""
        self._tasks.join()
        self._raise()

    def close(self) -> None:
        """End the thread, once it has done what it was handed. Raises nothing."""
        if self._thread is not None:
            self._tasks.put(None)
            self._thread.join()
            self._thread = None

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _work(self) -> None:
        failed = False
        while (task := self._tasks.get()) is not None:
            try:
                call, arguments, named = task
                if not failed:
                    call(*arguments, **named)
            except BaseException as error:
                self._error, failed = error, True
            finally:
                # What a checkpoint was copied to is not kept until the next task.
                task = call = arguments = named = None  # type: ignore[assignment]
                self._tasks.task_done()
        self._tasks.task_done()

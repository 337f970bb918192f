"""How stages hand over to each other: bounded queues, a ring of weight versions, and one end for all.

All wait on one condition. When a stage fails, everyone who waits or comes to wait is released with
``Over``, and who began it all gets the error with its own traceback.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from torch import Tensor

T = TypeVar("T")
Pause = Callable[[str], None]
"""Called with a name at every hand-over, before the lock is taken; tests sleep in it."""


class Over(Exception):  # noqa: N818 - no error: the line was closed, or another stage has failed
    """There is nothing more to do for a stage."""


class Line:
    """What the stages of a pipeline share: the condition they wait on, and how it ends."""

    def __init__(self, pause: Pause | None = None) -> None:
        self.changed = threading.Condition()
        self.error: BaseException | None = None
        self.over = False
        self.pause: Pause = pause if pause is not None else lambda where: None

    def wait_until(self, true: Callable[[], bool]) -> None:
        """Wait, holding ``changed``; raises ``Over`` once there is nothing to wait for."""
        self.changed.wait_for(lambda: self.over or true())
        if self.over:
            raise Over

    def end(self, error: BaseException | None = None) -> None:
        """Release everyone; the first error is the one that is kept."""
        with self.changed:
            self.over = True
            self.error = self.error if self.error is not None else error
            self.changed.notify_all()


class Queue(Generic[T]):
    """A queue of at most ``size`` items."""

    def __init__(self, line: Line, name: str, size: int) -> None:
        self.line, self.name, self.size = line, name, size
        self._items = deque[T]()

    def put(self, item: T) -> None:
        """Wait for a place. Raises ``Over``."""
        self.line.pause(f"put {self.name}")
        with self.line.changed:
            self.line.wait_until(lambda: len(self._items) < self.size)
            self._items.append(item)
            self.line.changed.notify_all()

    def wait(self) -> None:
        """Wait until there is an item, and leave it there. Raises ``Over``."""
        with self.line.changed:
            self.line.wait_until(lambda: bool(self._items))

    def get(self) -> T:
        """Wait for an item. Raises ``Over``."""
        self.line.pause(f"get {self.name}")
        with self.line.changed:
            self.line.wait_until(lambda: bool(self._items))
            item = self._items.popleft()
            self.line.changed.notify_all()
            return item


class Ring:
    """Buffers that hold the newest versions of the weights: version v is in buffer v modulo their number.

    A version is read between ``take`` and ``give_back``, by any number of readers. That one is written
    over while it is read would be an error in the order of the stages; it is asserted, not waited for.
    """

    def __init__(self, line: Line, buffers: Sequence[Tensor]) -> None:
        self.line, self.buffers = line, list(buffers)
        self.newest = -1
        self._readers = [0] * len(self.buffers)

    def restart(self) -> None:
        """Forget all versions."""
        with self.line.changed:
            assert not any(self._readers)
            self.newest = -1

    def take(self, version: int) -> Tensor:
        """The buffer of ``version``, once that is there. Raises ``Over``."""
        self.line.pause("take weights")
        with self.line.changed:
            self.line.wait_until(lambda: self.newest >= version)
            assert self.newest - version < len(self.buffers), "the version is gone"
            place = version % len(self.buffers)
            self._readers[place] += 1
            return self.buffers[place]

    def give_back(self, version: int) -> None:
        """The end of reading."""
        with self.line.changed:
            self._readers[version % len(self.buffers)] -= 1

    def place_of_next(self) -> int:
        """Where the next version is to be written."""
        with self.line.changed:
            place = (self.newest + 1) % len(self.buffers)
            assert not self._readers[place], "weights in use would be written over"
            return place

    def publish(self) -> None:
        """The next version is written."""
        self.line.pause("publish weights")
        with self.line.changed:
            self.newest += 1
            self.line.changed.notify_all()

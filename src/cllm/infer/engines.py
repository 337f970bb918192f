"""The engines of a model: each is made once, and writes for one caller at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Protocol

from cllm.infer.engine import Engine


class Numbered(Protocol):
    """Makes engines that are alike, by number, and gives the same one again for a number."""

    def __call__(self, *, number: int) -> Engine:
        """The engine of this number."""


class Engines:
    """Engines by whatever tells them apart. Threads may ask at once."""

    def __init__(self) -> None:
        self._made: dict[Hashable, tuple[Engine, str]] = {}
        self._lent: set[int] = set()
        # Reentrant: garbage collection may end a stream, which gives its engine back, while it is held.
        self._lock = threading.RLock()

    def kept(
        self,
        key: Hashable,
        make: Callable[[], tuple[Engine, str]],
        compiled: bool,
        say: Callable[[str], None],
    ) -> Engine:
        """The engine that ``make`` made for this ``key``, by what is ``compiled`` or without; ``say`` is
        told the line that came with it."""
        with self._lock:
            if (key, compiled) not in self._made:
                found = make()
                found[0].use_compiled(compiled)
                self._made[key, compiled] = found
            engine, line = self._made[key, compiled]
        if line and compiled:
            say(line)
        return engine

    @contextmanager
    def lent(self, engine: Engine | None, make: Numbered) -> Iterator[Engine]:
        """``engine`` if there is one, else the first of ``make`` that writes nothing else meanwhile."""
        if engine is not None:
            yield engine
            return
        with self._lock:
            alike = (make(number=number) for number in count())
            own = next(one for one in alike if not (id(one) in self._lent or one.is_taken))
            self._lent.add(id(own))
        try:
            yield own
        finally:
            with self._lock:
                self._lent.discard(id(own))

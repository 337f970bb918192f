"""How long the steps of a run take, without what comes between them."""

from __future__ import annotations

import time


class Clock:
    """Seconds of steps alone, and tokens a second since the last reading."""

    def __init__(self, tokens: int) -> None:
        self._begin = time.perf_counter()
        self._seconds, self._tokens_then = 0.0, tokens

    def start_lap(self) -> None:
        """A step begins."""
        self._begin = time.perf_counter()

    def lap(self) -> float:
        """A step has ended: its seconds."""
        now = time.perf_counter()
        seconds, self._begin = now - self._begin, now
        self._seconds += seconds
        return seconds

    def rate(self, tokens: int) -> float:
        """Tokens a second since the last call (the first time: since the clock was made)."""
        done = tokens - self._tokens_then
        speed = done / self._seconds if self._seconds else 0.0
        self._tokens_then, self._seconds = tokens, 0.0
        return speed

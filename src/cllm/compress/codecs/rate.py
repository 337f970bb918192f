"""The step for a number of bytes."""

from __future__ import annotations

from collections.abc import Callable
from math import log

TRIES = 14
CLOSE = 0.995  # of the wanted bytes: near enough to stop
COARSEST, FINEST = 6, -16  # octaves of the step around the table's spread
# Octaves that the search goes down by while no step was too fine.
_STRIDE = 2.0


class TooFineError(ValueError):
    """A step that is too small for ``what``."""

    def __init__(self, what: str) -> None:
        super().__init__(f"the step is too small for {what}; take a larger one")


def smallest_step(encode: Callable[[float], bytes], most: int, spread: float) -> bytes:
    """The longest body of at most ``most`` bytes that is found over the steps.

    ``encode`` maps a step to a body, ``spread`` is where steps begin. Between a step that is too fine and
    one that is coarse enough the next is interpolated, bytes falling exponentially with octaves; one that
    raises ``TooFineError`` needs too many. Raises ``ValueError`` if even the coarsest step does.
    """
    high = float(COARSEST)  # octaves: few enough bytes at ``high``, too many at ``low``
    best = encode(spread * 2.0**high)
    if len(best) > most:
        raise ValueError(
            f"target_bytes is out of reach: this table needs {len(best) - most} bytes more at least"
        )
    low, low_bytes, high_bytes = None, 0, len(best)
    octave = 0.0
    for _ in range(TRIES):
        try:
            body = encode(spread * 2.0**octave)
        except TooFineError:
            low, low_bytes, octave = octave, 0, (octave + high) / 2
            continue
        if len(body) > most:
            low, low_bytes = octave, len(body)
        else:
            high, high_bytes = octave, len(body)
            best = max(best, body, key=len)
            if len(best) >= CLOSE * most:
                break
        if low is None:
            if high <= FINEST:
                break
            octave = max(high - _STRIDE, float(FINEST))
        elif high - low < 1e-3:
            break
        else:
            share = _share(low_bytes, (1 + CLOSE) / 2 * most, high_bytes)
            octave = low + share * (high - low)
    return best


def _share(low: int, aim: float, high: int) -> float:
    """How far from ``low``'s step to ``high``'s the bytes come down to ``aim``; a half where it is not
    known, and never so near to either that the search stands still."""
    if not low > aim > high > 0:
        return 0.5
    return min(max((log(low) - log(aim)) / (log(low) - log(high)), 0.1), 0.9)

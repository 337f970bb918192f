"""The step for a number of bytes."""

from __future__ import annotations

from collections.abc import Callable

TRIES = 14
CLOSE = 0.995  # of the wanted bytes: near enough to stop
COARSEST, FINEST = 6, -16  # octaves of the step around the table's spread


def smallest_step(encode: Callable[[float], bytes], most: int, spread: float) -> bytes:
    """The longest body of at most ``most`` bytes that bisection finds over the steps.

    ``encode`` maps a step to a body, ``spread`` is where steps begin. Raises ``ValueError`` if even the
    coarsest step needs more bytes.
    """
    # Octaves: too many bytes at ``low``, few enough at ``high``.
    low, high = float(FINEST), float(COARSEST)
    best = encode(spread * 2.0**high)
    if len(best) > most:
        raise ValueError(
            f"target_bytes is out of reach: this table needs {len(best) - most} bytes more at least"
        )
    octave = 0.0
    for _ in range(TRIES):
        try:
            body = encode(spread * 2.0**octave)
        except ValueError:  # finer than 30-bit integers
            low, octave = octave, (octave + high) / 2
            continue
        if len(body) > most:
            low = octave
        else:
            high = octave
            if len(body) >= len(best):
                best = body
            if len(best) >= CLOSE * most or high - low < 1e-3:
                break
        octave = (low + high) / 2
    return best

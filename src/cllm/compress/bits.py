"""What entropy-coded matrices store as it is: bits in a row, and large numbers by Elias' gamma code."""

from __future__ import annotations

from typing import Any

import numpy as np


def packed(bits: list[np.ndarray]) -> bytes:
    """Booleans, array after array, eight to a byte."""
    return np.packbits(np.concatenate([np.zeros(0, dtype=bool), *bits])).tobytes()


class Bits:
    """Takes bits off packed bytes."""

    def __init__(self, data: np.ndarray) -> None:
        self._bits, self._place = np.unpackbits(data), 0

    def take(self, count: int) -> np.ndarray:
        """The next ``count`` bits, uint8."""
        part = self._bits[self._place : self._place + count]
        if len(part) != count:
            raise ValueError("damaged matrix: it is cut short")
        self._place += count
        return part

    def left(self) -> int:
        """Bits not taken yet."""
        return len(self._bits) - self._place


def push_gamma(stream: Any, coder: Any, value: int) -> None:
    """Elias' gamma code of ``value`` ≥ 1 below 2^31 onto a stack of ``constriction``."""
    bits = value.bit_length() - 1
    for start in range(0, bits, 16):
        width = min(16, bits - start)
        part = (value >> start) & ((1 << width) - 1)
        coder.encode_reverse(part, stream.model.Uniform(1 << width))
    coder.encode_reverse(bits, stream.model.Uniform(32))


def pop_gamma(stream: Any, coder: Any) -> int:
    """The value that ``push_gamma`` pushed."""
    bits = int(coder.decode(stream.model.Uniform(32)))
    value = 1 << bits
    for start in reversed(range(0, bits, 16)):
        width = min(16, bits - start)
        value |= int(coder.decode(stream.model.Uniform(1 << width))) << start
    return value

"""The hexacode and the binary Golay code, in Curtis's miracle octad generator.

Conway & Sloane, "Sphere Packings, Lattices and Groups" (3rd ed. 1999), chapter 11, sections 2 and 5.
Coordinate 4·j + i of the Golay code is row i of column j of the 4 × 6 array. The elements 0, 1, ω, ω̄
of GF(4) are 0, 1, 2, 3; addition is exclusive or.
"""

from __future__ import annotations

import itertools

import numpy as np

_TIMES = np.array([[0, 0, 0, 0], [0, 1, 2, 3], [0, 2, 3, 1], [0, 3, 1, 2]])


def hexacode() -> np.ndarray:
    """The 64 words (64, 6) over GF(4): (a, b, c, f(1), f(ω), f(ω̄)) with f(x) = ax² + bx + c."""
    words = []
    for a, b, c in itertools.product(range(4), repeat=3):
        values = [_TIMES[a, _TIMES[x, x]] ^ _TIMES[b, x] ^ c for x in (1, 2, 3)]
        words.append((a, b, c, *values))
    return np.array(words)


def column_patterns() -> np.ndarray:
    """The 16 columns of the array as bits of a number (bit i is row i), arranged (2, 4, 2):
    by parity of the column, by its element of GF(4), by its top bit."""
    out = np.empty((2, 4, 2), dtype=np.int64)
    for pattern in range(16):
        bits = [pattern >> i & 1 for i in range(4)]
        symbol = bits[1] ^ (2 * bits[2]) ^ (3 * bits[3])
        out[sum(bits) % 2, symbol, bits[0]] = pattern
    return out


def golay() -> np.ndarray:
    """The 4096 words (4096, 24) of 0 and 1: columns of one parity, which is the top row's parity
    too, whose elements of GF(4) spell a word of the hexacode."""
    patterns, words = column_patterns(), []
    for parity, word in itertools.product(range(2), hexacode()):
        for tops in itertools.product(range(2), repeat=5):
            last = (parity + sum(tops)) % 2
            words.append([patterns[parity, s, t] for s, t in zip(word, (*tops, last), strict=True)])
    columns = np.array(words)
    return (columns[:, :, None] >> np.arange(4) & 1).reshape(-1, 24)

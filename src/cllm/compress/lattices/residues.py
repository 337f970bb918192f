"""Integers of one residue class as symbols: their ranks by magnitude, and a sign where both occur.

A class r modulo s is folded onto its mirror image, r ≤ s/2. Where it is its own (r = 0, r = s/2), every
magnitude occurs with both signs and the rank counts magnitudes; elsewhere each magnitude r, s − r, s + r …
occurs once, and the rank says the sign: that is what a known residue saves.
"""

from __future__ import annotations

from decimal import Decimal, localcontext
from functools import cache

import numpy as np

from cllm.compress.coded import CLASSES, ESCAPE, LOWEST, SYMBOLS

# An observation adds so many counts; the start of a model is worth as many observations.
UNIT, START = 32, 24
SPACINGS = (1, 2, 4, 8)
CONTEXTS = [(s, r) for s in SPACINGS for r in range(s // 2 + 1)]
"""(spacing, folded residue) of every kind of coordinate."""
COSET = len(CONTEXTS)
"""Number of the context of a block's parity m, which has two symbols."""


def context(spacing: int, residue: int) -> int:
    """The place of (spacing, folded residue) in ``CONTEXTS``."""
    return CONTEXTS.index((spacing, residue))


@cache
def is_even(spacing: int, residue: int) -> bool:
    """Whether the class holds the negative of each of its integers."""
    return 2 * residue in (0, spacing)


def ranks(values: np.ndarray, spacing: int, residue: int) -> np.ndarray:
    """Ranks of ``values`` of a folded class."""
    if is_even(spacing, residue):
        return (np.abs(values) - residue) // spacing
    above = 2 * ((values - residue) // spacing)
    return np.where(values >= 0, above, -above - 1)


def values_of(found: np.ndarray, spacing: int, residue: int) -> np.ndarray:
    """The integers of ranks, those of a class with both signs as magnitudes."""
    if is_even(spacing, residue):
        return residue + spacing * found
    half = (found + 1) // 2
    return residue + spacing * np.where(found % 2, -half, half)


@cache
def shift_of(number: int, place: int) -> int:
    """Low bits of a rank that are stored as they are, for entries of class ``number`` (expected
    magnitudes in thirds of an octave): the rest is then expected below eight symbols."""
    if place == COSET:
        return 0
    spacing, residue = CONTEXTS[place]
    # The spacing of ranks' magnitudes in octaves: half where each occurs once.
    step = spacing.bit_length() - 1 - (not is_even(spacing, residue))
    return max(0, number // 3 + LOWEST - 2 - step)


@cache
def start(number: int, place: int) -> np.ndarray:
    """(symbols,) counts of a model before anything is seen: a geometric distribution where most magnitudes
    are below 1, half-normal above. By decimal arithmetic, which rounds alike on every machine."""
    if place == COSET:
        return np.array([START * UNIT // 2] * 2 + [0] * (SYMBOLS - 2))
    spacing, residue = CONTEXTS[place]
    even, shift = is_even(spacing, residue), shift_of(number, place)
    # The magnitude in the middle of each symbol's ranks.
    middle = (np.arange(SYMBOLS) << shift) + ((1 << shift) - 1) // 2
    sizes = np.abs(values_of(middle, spacing, residue)).tolist()
    with localcontext(prec=28):
        mean = Decimal(2) ** (Decimal(number) / 3 + LOWEST)
        if mean < 1:
            weights = [(mean / (1 + mean)) ** k for k in sizes]
        else:  # a half-normal's mean is σ √(2/π)
            spread = mean * Decimal("1.2533141373155")
            weights = [(-((k / spread) ** 2) / 2).exp() for k in sizes]
            if even and residue == 0 and shift == 0:
                weights[0] /= 2  # 0 has no sign
        total = sum(weights)
        counts = [1 + int(START * UNIT * w / total) for w in weights]
    return np.array(counts, dtype=np.int64)


assert CLASSES % 3 == 0
assert SYMBOLS == ESCAPE + 1

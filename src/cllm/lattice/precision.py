"""fplll's floating-point types as a ladder, and MPFR's global precision borrowed and given back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np

# Above this size of entry, squared norms leave double's exponent range unless rows carry their own.
ROW_EXPONENT_BITS = 400


def ladder(n: int, bits: int) -> list[tuple[str, int]]:
    """(float type, MPFR bits or 0) from the fastest to the surest, for n rows of ``bits``-bit entries.

    The last rung is the precision with which L² provably ends, 1.6·n + o(n) bits (Nguyen & Stehlé,
    "An LLL algorithm with quadratic complexity", SIAM J. Comput. 2009, Theorem 2: log2((1+η)²/(δ-η²))
    = 1.6 at η ≈ ½, δ ≈ 1), with room for the lower-order terms.
    """
    from fpylll import config

    names = [name for name in ("d", "ld", "dd", "qd") if name in config.float_types]
    if bits > ROW_EXPONENT_BITS:
        names = [name for name in names if name in ("d", "ld")]
    middle, proved = 106 + n // 4, int(1.6 * n) + 2 * n.bit_length() + 64
    rungs = sorted({max(128, middle), max(160, proved)})
    return [(name, 0) for name in names] + [("mpfr", p) for p in rungs]


def log_squared_norms(gso: Any) -> np.ndarray:
    """ln‖b*_i‖² (n,) of an updated fpylll GSO object, whatever their range."""
    if gso.float_type == "mpfr":
        # fpylll hands MPFR norms over as doubles, which overflow; their logarithms do not.
        return np.array([gso.get_log_det(i, i + 1) for i in range(gso.d)])
    pairs = [gso.get_r_exp(i, i) for i in range(gso.d)]
    return np.array([np.log(r) + exponent * np.log(2) for r, exponent in pairs])


def segments(log_norms: np.ndarray) -> list[tuple[int, int]]:
    """Ranges of rows [low, high) between the places where every later norm is above every earlier one.

    No vector that is short in a projected block has a coefficient beyond such a place, so blocks are
    reduced and enumerated inside a segment. In an LLL-reduced one the norms lie within 2^O(n) of each
    other, which double holds: fplll's enumeration does not end on norms that under- or overflow.
    """
    highest = np.maximum.accumulate(log_norms)
    lowest = np.minimum.accumulate(log_norms[::-1])[::-1]
    cuts = [0, *(np.flatnonzero(lowest[1:] > highest[:-1]) + 1).tolist(), len(log_norms)]
    return list(pairwise(cuts))


@contextmanager
def mpfr_precision(bits: int) -> Iterator[None]:
    """MPFR's precision, which fplll keeps in one global, set to ``bits`` inside the block (0: left)."""
    from fpylll import FPLLL

    if bits == 0:
        yield
        return
    before = FPLLL.get_precision()
    FPLLL.set_precision(bits)
    try:
        yield
    finally:
        FPLLL.set_precision(before)

"""A basis as exact integers: what fplll reduces, and what the proof of a reduction is about."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

# Scaling leaves the Gram–Schmidt norms of a float basis right to about this many bits.
KEPT_BITS = 32


@dataclass(frozen=True, kw_only=True)
class IntegerBasis:
    """Integer rows standing for the basis ``rows · 2^-bits``; what was rounded moved the logarithm of
    every Gram–Schmidt norm by at most 2√n·2^-KEPT_BITS."""

    rows: np.ndarray
    bits: int


def to_integers(B: np.ndarray) -> IntegerBasis:
    """Scale a checked basis (see ``as_basis``) to integers.

    An integer basis, and a float basis whose entries are integers, are taken as they are. Another
    float basis is multiplied by 2^bits, with bits the smaller of (a) what represents every entry
    exactly and (b) log2(½√(nd)/σ_min) + KEPT_BITS, or (a) where σ_min is within rounding of 0. By
    (b) the rounding ΔB has ‖ΔB‖_F/σ_min ≤ 2^-KEPT_BITS =: ε; every leading sub-basis has at least that
    smallest singular value (interlacing), and |log det(I+E)| ≤ √n‖E‖_F to first order, so log‖b*_i‖
    moves by ≤ 2√n·ε.
    """
    if B.dtype.kind != "f":
        return IntegerBasis(rows=B, bits=0)
    exact_bits = _fraction_bits(B)
    if exact_bits <= 0:
        return IntegerBasis(rows=_round_shifted(B, 0), bits=0)
    singular = np.linalg.svd(B, compute_uv=False)
    largest, smallest = float(singular[0]), float(singular[-1])
    needed = exact_bits
    # Below some eps·σ_max a computed σ_min is rounding, and no guide.
    if smallest > 2**10 * np.finfo(np.float64).eps * largest * max(B.shape):
        spread = 0.5 * math.sqrt(B.size)
        needed = math.ceil(math.log2(spread) - math.log2(smallest)) + KEPT_BITS
    bits = min(exact_bits, needed)
    return IntegerBasis(rows=_round_shifted(B, bits), bits=bits)


def _fraction_bits(B: np.ndarray) -> int:
    """The least s such that B·2^s is integral."""
    mantissa, exponent = np.frexp(B)
    whole = np.ldexp(mantissa, 53).astype(np.int64)
    used = whole != 0
    if not used.any():
        return 0
    lowest = whole[used] & -whole[used]
    trailing = np.frexp(lowest.astype(np.float64))[1] - 1
    return int((53 - exponent[used] - trailing).max())


def _round_shifted(B: np.ndarray, bits: int) -> np.ndarray:
    """round(B·2^bits), as int64 where it fits, otherwise as Python ints."""
    top = math.frexp(float(np.abs(B).max()))[1] + bits
    if top <= 62:
        return np.rint(np.ldexp(B, bits)).astype(np.int64)
    mantissa, exponent = np.frexp(B)
    whole = np.ldexp(mantissa, 53).astype(np.int64)
    shift = exponent.astype(np.int64) - 53 + bits
    pairs = zip(whole.ravel().tolist(), shift.ravel().tolist(), strict=True)
    flat = [_shift(w, s) for w, s in pairs]
    return np.array(flat, dtype=object).reshape(B.shape)


def _shift(value: int, bits: int) -> int:
    if bits >= 0:
        return value << bits
    half = 1 << (-bits - 1)
    return (value + half) >> -bits


def magnitude(rows: np.ndarray) -> int:
    """max |entry|: NumPy's abs of the least int64 is negative."""
    return max(abs(int(rows.max())), abs(int(rows.min())))


def narrow(rows: np.ndarray) -> np.ndarray:
    """int64 where every entry fits, otherwise unchanged (Python ints)."""
    if rows.dtype == np.int64:
        return rows
    limit = 2**63
    fits = all(-limit <= x < limit for x in rows.flat)
    return rows.astype(np.int64) if fits else rows


def to_float(rows: np.ndarray, bits: int) -> np.ndarray:
    """rows · 2^-bits in float64, each entry correctly rounded."""
    if rows.dtype == np.int64 and magnitude(rows) < 2**53:
        return np.ldexp(rows.astype(np.float64), -bits)
    scale = 1 << max(bits, 0)
    up = 1 << max(-bits, 0)
    return np.array([[int(x) * up / scale for x in row] for row in rows], dtype=np.float64)


def to_fplll(rows: np.ndarray) -> Any:
    """The rows as an fpylll ``IntegerMatrix`` over GMP integers."""
    from fpylll import IntegerMatrix

    return IntegerMatrix.from_matrix(rows.tolist())


def from_fplll(matrix: Any) -> np.ndarray:
    """An fpylll ``IntegerMatrix`` as int64 where it fits, otherwise as Python ints."""
    out = np.empty((matrix.nrows, matrix.ncols), dtype=object)
    matrix.to_matrix(out)
    return narrow(out)

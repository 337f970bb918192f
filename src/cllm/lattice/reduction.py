"""Lattice reduction: LLL, deep insertion, BKZ and HKZ, done by fplll and proved in the call."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cllm.lattice.check import as_basis, positive_int
from cllm.lattice.integers import (
    IntegerBasis,
    from_fplll,
    magnitude,
    narrow,
    to_float,
    to_fplll,
    to_integers,
)
from cllm.lattice.modular import first_dependent_row
from cllm.lattice.precision import ROW_EXPONENT_BITS, ladder, mpfr_precision
from cllm.lattice.verify import ETA, Certificate, certify

METHODS = ("lll", "deep", "seysen", "bkz", "hkz")
# Those that work in steps of ours: fplll's LLL, which comes first in any case, cannot be interrupted.
STOPPABLE = ("deep", "bkz", "hkz")

# HKZ enumerates every projected block up to the whole dimension without pruning.
HKZ_LIMIT = 50
# A block's first vector is replaced by one that is shorter by this factor, squared, or more: δ is
# where LLL stops, and HKZ asks for the shortest vectors themselves.
HKZ_DELTA = 0.999999


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """A reduced basis and the proof that it spans the same lattice.

    Attributes:
        basis: (n, d) reduced rows; float64 for a float basis, int64 (or Python ints in an object
            array) for an integer one. ``basis == transform @ B`` exactly for integers, and up to the
            rounding of the scaling for floats.
        transform: (n, n) exact integers U with |det U| = 1, int64 or Python ints in an object array.
        bits: the float basis was reduced as integers ``round(B · 2^bits)``; 0 for integers.
        float_type: fplll's arithmetic that was enough: d, ld, dd, qd or mpfr with ``precision`` bits.
        certificate: what the verification measured.
        seconds: wall time of ``scale``, ``reduce`` and ``verify``.
        finished: False where ``max_seconds`` ended the method before it was done.
    """

    basis: np.ndarray
    transform: np.ndarray
    method: str
    delta: float
    block_size: int
    bits: int
    float_type: str
    precision: int
    certificate: Certificate
    finished: bool = True
    seconds: dict[str, float] = field(default_factory=dict)


def reduce(
    B: Any,
    method: str = "lll",
    delta: float = 0.99,
    block_size: int = 20,
    *,
    max_seconds: float | None = None,
) -> Reduction:
    """Reduce the basis B (n, d), rows are vectors, and verify the result.

    Args:
        B: floats or integers of any scale (Python ints in lists or object arrays beyond int64). A
            float basis is scaled to integers with enough bits for its condition (``to_integers``).
        method: ``lll`` (Lenstra, Lenstra & Lovász 1982, in the L² form of Nguyen & Stehlé 2009);
            ``deep`` (LLL with deep insertions, Schnorr & Euchner 1994); ``seysen`` (LLL, then primal
            and dual shortened together, Seysen 1993: it gives up the Lovász condition, and the bench
            finds no gain in rounding); ``bkz`` with blocks of ``block_size`` (Schnorr & Euchner
            1994, with the early abort of Chen & Nguyen's BKZ 2.0, 2011); ``hkz`` (Korkine &
            Zolotarev: every projected first vector is shortest, to a factor √``HKZ_DELTA``).
        delta: Lovász factor, in (0.2601, 1). HKZ enumerates with ``HKZ_DELTA`` whatever it is.
        block_size: for ``bkz``, 2 to n (larger is taken as n).
        max_seconds: for ``deep``, ``bkz`` and ``hkz``: no further insertion or tour is begun when this
            time has passed since the call. The LLL before them and a tour begun are not interrupted;
            ``finished`` says whether it came to that, and what was reached is reduced as LLL is.

    When fplll reports that a precision does not suffice, or the verification finds so, the next one
    is taken: double, long double, double-double where fplll has it, MPFR.

    Raises:
        ValueError: malformed or rank-deficient B (names the first dependent row), unknown method, or
            parameters out of range.
        ArithmeticError: the verification failed even at fplll's proved precision.
    """
    array = as_basis(B)
    _check(array, method, delta, block_size, max_seconds)
    started = time.perf_counter()
    deadline = None if max_seconds is None else started + max_seconds
    scaled = _scaled(array)
    scaled_at = time.perf_counter()
    block = min(block_size, len(array))
    faults = ""
    for float_type, precision in ladder(len(array), _bit_length(scaled.rows)):
        step = time.perf_counter()
        try:
            with mpfr_precision(precision):
                U, R, finished = _run(scaled.rows, method, delta, block, float_type, deadline)
        except _precision_errors() as error:
            faults = str(error)
            continue
        reduced_at = time.perf_counter()
        certificate = certify(scaled.rows, U, R, delta)
        if certificate.holds(delta, reduced=method != "seysen"):
            seconds = {
                "scale": scaled_at - started,
                "reduce": reduced_at - step,
                "verify": time.perf_counter() - reduced_at,
            }
            return Reduction(
                basis=to_float(R, scaled.bits) if array.dtype.kind == "f" else R,
                transform=U,
                method=method,
                delta=delta,
                block_size=block,
                bits=scaled.bits,
                float_type=float_type,
                precision=precision,
                certificate=certificate,
                finished=finished,
                seconds=seconds,
            )
        faults = certificate.faults(delta, reduced=method != "seysen")
    raise ArithmeticError(f"reduction of a basis of shape {array.shape} was not verified: {faults}")


def _check(
    array: np.ndarray, method: str, delta: float, block_size: int, max_seconds: float | None
) -> None:
    n = len(array)
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    # L² asks for δ > η² (Nguyen & Stehlé 2009, theorem 2).
    if not ETA**2 < delta < 1:
        raise ValueError(f"delta must lie in ({ETA**2:.4f}, 1), got {delta!r}")
    if positive_int(block_size, "block_size") < 2:
        raise ValueError("block_size must be at least 2")
    if max_seconds is not None and not max_seconds > 0:
        raise ValueError(f"max_seconds must be positive, got {max_seconds!r}")
    if max_seconds is not None and method not in STOPPABLE:
        raise ValueError(f"max_seconds is for the methods {STOPPABLE}: {method} cannot be stopped")
    if method == "hkz" and n > HKZ_LIMIT:
        raise ValueError(
            f"hkz enumerates the whole dimension: basis of shape {array.shape} is beyond n ="
            f" {HKZ_LIMIT}; use method='bkz'"
        )


def _scaled(array: np.ndarray) -> IntegerBasis:
    from cllm.lattice.gso import lq

    scaled = to_integers(array)
    if array.dtype.kind == "f" and scaled.bits > 0:
        # Refuses rows that are dependent up to float64's rounding; scaling then keeps full rank.
        lq(array)
    elif (row := first_dependent_row(scaled.rows)) is not None:
        raise ValueError(
            f"basis of shape {array.shape} is rank deficient: row {row} depends on the rows before"
            " it"
        )
    return IntegerBasis(rows=narrow(scaled.rows), bits=scaled.bits)


def _bit_length(rows: np.ndarray) -> int:
    return magnitude(rows).bit_length()


def _precision_errors() -> tuple[type[Exception], ...]:
    from fpylll import ReductionError

    # RuntimeError is what fplll's BKZ and GSO raise on infinite or NaN norms.
    return (ReductionError, RuntimeError)


def _run(
    rows: np.ndarray,
    method: str,
    delta: float,
    block: int,
    float_type: str,
    deadline: float | None,
) -> tuple[np.ndarray, np.ndarray, bool]:
    """LLL always first, then the method on the same GSO object, so that one U tracks both."""
    from fpylll import GSO, LLL, IntegerMatrix

    A = to_fplll(rows)
    U = IntegerMatrix.identity(len(rows))
    flags = GSO.DEFAULT
    if float_type in ("d", "ld") and _bit_length(rows) > ROW_EXPONENT_BITS:
        flags = GSO.ROW_EXPO
    M = GSO.Mat(A, U=U, float_type=float_type, flags=flags)
    lll = LLL.Reduction(M, delta=delta)
    lll()
    finished = True
    stronger: dict[str, Callable[[], bool]] = {
        "deep": lambda: _deep(M, lll, delta, deadline),
        "bkz": lambda: _bkz(M, lll, delta, block, deadline),
        "hkz": lambda: _bkz(M, lll, HKZ_DELTA, len(rows), deadline),
    }
    if method in stronger and len(rows) > 1:
        finished = stronger[method]()
    if method == "seysen":
        from cllm.lattice.seysen import seysen

        return *seysen(from_fplll(U), from_fplll(A)), True
    return from_fplll(U), from_fplll(A), finished


def _deep(M: Any, lll: Any, delta: float, deadline: float | None) -> bool:
    from cllm.lattice.deep import deep_insertion

    return deep_insertion(M, lll, delta, deadline)


def _bkz(M: Any, lll: Any, delta: float, block: int, deadline: float | None) -> bool:
    from cllm.lattice.bkz import bkz

    return bkz(M, lll, delta, block, deadline)

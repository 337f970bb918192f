"""Tours of block Korkine–Zolotarev reduction, with pruning and preprocessing computed here."""

from __future__ import annotations

import time
from typing import Any

from cllm.lattice.precision import log_squared_norms, segments

# Full enumeration of a block is cheaper than preprocessing and pruning it up to about this size.
FULL_BLOCK = 30
PREPROCESS_BLOCK = 20
# Beyond this size a block that spans its whole segment is pruned like any other.
FULL_LIMIT = 50


def bkz(M: Any, lll: Any, delta: float, block: int, deadline: float | None) -> bool:
    """BKZ (Schnorr & Euchner 1994) in place on an fpylll GSO object whose basis is LLL-reduced.

    Ends when a tour changes nothing, when the profile's slope has not fallen for five tours (the
    early abort of Chen & Nguyen, Asiacrypt 2011), or when ``deadline`` (of ``time.perf_counter``) has
    passed before a tour.
    A block that spans the whole basis gives HKZ, and is then not aborted, nor pruned up to
    ``FULL_LIMIT`` rows. Rows separated by a gap (``segments``) are reduced apart.

    Returns:
        False if the deadline ended it.
    """
    finished = True
    for low, high in segments(log_squared_norms(M)):
        if high - low > 1:
            finished &= _tours(M, lll, delta, min(block, high - low), (low, high), deadline)
    # A segment's tours leave the rows after it unreduced against it.
    lll()
    return finished


def _tours(
    M: Any, lll: Any, delta: float, block: int, rows: tuple[int, int], deadline: float | None
) -> bool:
    """Tours of the rows [low, high) until they settle, or until ``deadline`` has passed."""
    from fpylll import BKZ

    low, high = rows
    whole = block >= high - low and block <= FULL_LIMIT
    param = BKZ.Param(block, strategies=_strategies(block, prune=not whole), delta=delta)
    tours = BKZ.Reduction(M, lll, param)
    best, stalled = float("inf"), 0
    while deadline is None or time.perf_counter() < deadline:
        settled = tours.tour(0, param, low, high)
        if isinstance(settled, tuple):
            settled = settled[0]
        if settled:
            return True
        slope = -M.get_current_slope(low, high)
        stalled = 0 if slope < best else stalled + 1
        best = min(best, slope)
        if stalled >= 5 and not whole:
            return True
    return False


def _strategies(block: int, prune: bool) -> list[Any]:
    """One strategy a block size: fplll's default file lies where its wheel was built, not here."""
    from fpylll import Pruning
    from fpylll.fplll.bkz_param import Strategy

    made = []
    for size in range(block + 1):
        if size <= FULL_BLOCK:
            made.append(Strategy(size, [], [Pruning.PruningParams(1.0, [1.0] * size, 1.0)]))
            continue
        coefficients = Pruning.LinearPruningParams(size, size // 2) if prune else None
        full = Pruning.PruningParams(1.0, [1.0] * size, 1.0)
        made.append(Strategy(size, [PREPROCESS_BLOCK], [coefficients or full]))
    return made

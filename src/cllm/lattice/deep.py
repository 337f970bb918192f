"""LLL with deep insertions (Schnorr & Euchner, Mathematical Programming 66, 1994, section 3)."""

from __future__ import annotations

import time
from typing import Any


def deep_insertion(M: Any, lll: Any, delta: float, deadline: float | None) -> bool:
    """Deep-insertion LLL in place on an fpylll GSO object whose basis is LLL-reduced.

    Where LLL only ever swaps neighbours, row k is moved to the first place i at which its
    projection π_i(b_k) is shorter than √δ·‖b*_i‖.

    Returns:
        False if ``deadline`` (of ``time.perf_counter``) passed first; the basis is then LLL-reduced.
    """
    n = M.d
    k = 1
    while k < n:
        if deadline is not None and time.perf_counter() > deadline:
            lll()
            return False
        lll.size_reduction(k, k + 1)
        M.update_gso_row(k, k)
        place = _place(M, k, delta)
        if place == k:
            k += 1
        else:
            M.move_row(k, place)
            k = place
    lll.size_reduction(0, n)
    return True


def _place(M: Any, k: int, delta: float) -> int:
    """The first i ≤ k with ‖π_i(b_k)‖² < δ‖b*_i‖², where k means that the row stays."""
    tail = [M.get_mu(k, j) ** 2 * M.get_r(j, j) for j in range(k)]
    projected = sum(tail) + M.get_r(k, k)
    for i in range(k):
        if projected < delta * M.get_r(i, i):
            return i
        projected -= tail[i]
    return k

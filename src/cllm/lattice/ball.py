"""Every lattice point in a ball around the origin (Fincke & Pohst, Math. Comp. 44, 1985)."""

from __future__ import annotations

from typing import Any

import numpy as np

from cllm.lattice.check import as_real_basis
from cllm.lattice.gso import lq

# Partial vectors expanded together; a level that grows beyond is split and done depth-first.
CHUNK = 1 << 18
# Partial vectors that one chunk may become: beyond, memory runs out.
PARTIAL_LIMIT = 64 * CHUNK


def coefficients_in_ball(B: Any, radius: float, limit: int = 20_000_000) -> np.ndarray:
    """Coefficients (count, n) int64 of all lattice points with norm ≤ radius·(1 + 1e-9).

    The origin is included; the order is not specified. A reduced basis is faster.

    Raises:
        ValueError: bad basis or radius, or more than ``limit`` points (or partial vectors together).
    """
    basis = as_real_basis(B)
    if not (isinstance(radius, (int, float, np.number)) and 0 <= radius < np.inf):
        raise ValueError(f"radius must be finite and not negative, got {radius!r}")
    L, _ = lq(basis)
    bound = (radius * (1 + 1e-9)) ** 2
    n = len(L)
    found: list[np.ndarray] = []
    total = 0
    stack = [(n, np.zeros((1, 0)), np.zeros((1, n)), np.zeros(1))]
    while stack:
        level, x, pull, partial = stack.pop()
        if level == 0:
            found.append(x.astype(np.int64))
            total += len(x)
            if total > limit:
                raise ValueError(
                    f"more than {limit} points of a lattice of shape {basis.shape} lie within"
                    f" {radius}"
                )
            continue
        for part in range(0, len(x), CHUNK):
            cut = slice(part, part + CHUNK)
            stack.append(_expand(L, level - 1, x[cut], pull[cut], partial[cut], bound, limit))
    return np.concatenate(found)


def _expand(
    L: np.ndarray,
    i: int,
    x: np.ndarray,
    pull: np.ndarray,
    partial: np.ndarray,
    bound: float,
    limit: int,
) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    """All choices of coefficient i for every partial vector; ``pull`` is its Σ_{j>i} x_j L_j."""
    r = L[i, i]
    centre = -pull[:, i] / r
    reach = np.sqrt(np.maximum(bound - partial, 0)) / r
    low, high = np.ceil(centre - reach), np.floor(centre + reach)
    count = np.maximum(high - low + 1, 0)
    # A partial vector may lead to no point, so only the last level is held to the caller's limit.
    most = limit if i == 0 else max(limit, PARTIAL_LIMIT)
    if count.sum() > most:
        raise ValueError(
            f"more than {most} points or partial vectors of a lattice of dimension {len(L)} lie in"
            " the ball: reduce the basis, or take a smaller radius"
        )
    count = count.astype(np.int64)
    parent = np.repeat(np.arange(len(x)), count)
    offset = np.arange(len(parent)) - np.repeat(np.cumsum(count) - count, count)
    value = low[parent] + offset
    partial = partial[parent] + (r * (value - centre[parent])) ** 2
    pull = pull[parent, :i] + value[:, None] * L[i, :i]
    return i, np.column_stack([value, x[parent]]), pull, partial

"""Reduction: what the wrapper costs over fpylll, and what exact search takes."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from cllm.bench.harness import Claim
from cllm.bench.lattice_timing import medians, row


def covariance_lattice(n: int, seed: int = 0) -> np.ndarray:
    """Rows of the Cholesky factor of the sample covariance of mixed variables of unlike scale."""
    rng = np.random.default_rng(seed)
    samples = rng.standard_normal((n, 4 * n)) * np.exp(rng.standard_normal(n))[:, None]
    return np.linalg.cholesky(np.cov(rng.standard_normal((n, n)) @ samples))


def q_ary(n: int, q: int, seed: int) -> np.ndarray:
    """A random q-ary lattice of determinant q^(n/2), the rows of q first: fplll's LLL takes far
    longer, and leaves double precision in 256 dimensions, where they come last."""
    rng = np.random.default_rng(seed)
    k = n // 2
    basis = np.eye(n, dtype=np.int64)
    basis[:k, :k] *= q
    basis[k:, :k] = rng.integers(0, q, (n - k, k))
    return basis


def speed(quick: bool) -> tuple[list[dict[str, Any]], list[Claim]]:
    """LLL through ``reduce``, less its verification, against fpylll on the same integers."""
    from fpylll import GSO, LLL, IntegerMatrix

    from cllm import lattice
    from cllm.lattice.integers import to_integers

    n = 24 if quick else 128
    B = covariance_lattice(n)
    integers = to_integers(B).rows.tolist()
    ours: list[float] = []
    verify: list[float] = []

    def wrapped() -> None:
        started = time.perf_counter()
        result = lattice.reduce(B)
        verify.append(result.seconds["verify"])
        ours.append(time.perf_counter() - started - verify[-1])

    def direct() -> None:
        A, U = IntegerMatrix.from_matrix(integers), IntegerMatrix.identity(n)
        LLL.Reduction(GSO.Mat(A, U=U, float_type="d"), delta=0.99)()

    def wrapper() -> None:
        A, U = IntegerMatrix.from_matrix(integers), IntegerMatrix.identity(n)
        LLL.reduction(A, U, delta=0.99)

    rounds = 3 if quick else 15
    theirs = medians({"ours": wrapped, "direct": direct, "wrapper": wrapper}, rounds)
    seconds = float(np.median(ours[1:]))
    rows = [
        row("LLL", f"n={n}, with transform", seconds, "s", "fpylll in double", theirs["direct"]),
        row("LLL", f"n={n}, with transform", seconds, "s", "LLL.reduction", theirs["wrapper"]),
        row("LLL verification", f"n={n}", float(np.median(verify[1:])), "s"),
    ]
    claim = Claim(
        name=f"LLL of n={n} over fpylll in double, times",
        value=seconds / theirs["direct"],
        required=1.2,
        higher_is_better=False,
    )
    return rows, [claim]


def shortest_vectors(quick: bool) -> tuple[list[dict[str, Any]], list[Claim]]:
    """Exact shortest vectors of random lattices, up to the dimension where ``shortest`` refuses: of
    several lattices there, since the time differs from one to the next."""
    from cllm import lattice
    from cllm.lattice.shortest import EXACT_LIMIT

    limit = 20 if quick else EXACT_LIMIT
    cases = [(limit, seed) for seed in (1, 2, 3)]
    if not quick:
        cases = [(40, 1), (50, 1), *cases]
    rows, slowest = [], 0.0
    for n, seed in cases:
        started = time.perf_counter()
        found = lattice.shortest(q_ary(n, 1009, seed))
        seconds = time.perf_counter() - started
        case = f"q-ary n={n}, seed {seed}, exact"
        rows.append(row("shortest vector", case, seconds, "s"))
        rows.append(row("shortest vector", case, found.ratio, "of heuristic"))
        if n == limit:
            slowest = max(slowest, seconds)
    claim = Claim(
        name=f"exact shortest vector at n={limit}, slowest of 3, seconds",
        value=slowest,
        required=60.0,
        higher_is_better=False,
    )
    return rows, [claim]

"""Reduction: what the wrapper costs over fpylll, what each method reaches, what exact search takes."""

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
    """A random q-ary lattice of determinant q^(n/2)."""
    rng = np.random.default_rng(seed)
    k = n // 2
    basis = np.eye(n, dtype=np.int64)
    basis[: n - k, n - k :] = rng.integers(0, q, (n - k, k))
    basis[n - k :, n - k :] *= q
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


def quality(quick: bool) -> tuple[list[dict[str, Any]], list[Claim]]:
    """Time, root Hermite factor and flatness of each method; what each does for decoding."""
    from cllm import lattice

    rows = []
    cases: list[tuple[str, dict[str, Any]]] = [
        ("lll", {}),
        ("bkz", {"block_size": 20, "max_seconds": 1.0 if quick else 8.0}),
        ("bkz", {"block_size": 40, "max_seconds": 1.0 if quick else 8.0}),
    ]
    for n in (16, 24) if quick else (32, 64, 128, 256):
        # A q-ary lattice of 256 dimensions takes a minute of LLL, most of it in long double.
        kind, B = ("q-ary", q_ary(n, 1009, 1)) if n < 256 else ("covariance", covariance_lattice(n))
        for method, arguments in cases:
            started = time.perf_counter()
            result = lattice.reduce(B, method, **arguments)
            seconds = time.perf_counter() - started
            name = method.upper() + (f"-{arguments['block_size']}" if arguments else "")
            case = f"{kind} n={n}" + ("" if result.finished else ", stopped by the clock")
            factor = lattice.root_hermite_factor(result.basis)
            rows.append(row(name, case, seconds, "s"))
            rows.append(row(name, case, 1000 * (factor - 1), "‰, root Hermite factor above 1"))
            rows.append(row(name, case, lattice.mean_ratio_db(result.basis), "dB over flat"))
    rows += _decoding_error(16 if quick else 64, 500 if quick else 20_000)
    return rows, []


def _decoding_error(n: int, count: int) -> list[dict[str, Any]]:
    """Mean squared error of uniform targets after each reduction, over that after LLL."""
    from cllm import lattice

    rows = []
    for case, B in (("covariance", covariance_lattice(n)), ("q-ary", q_ary(n, 1009, 1))):
        T = np.random.default_rng(0).uniform(-3, 3, (count, n)) @ B
        first: dict[str, float] = {}
        for method in ("lll", "seysen", "deep", "bkz"):
            basis = lattice.reduce(B, method).basis
            for decoder in ("rounding", "nearest-plane"):
                error = float((lattice.closest(basis, T, decoder).distances ** 2).mean())
                first.setdefault(decoder, error)
                name = f"error of {decoder} after {method}"
                rows.append(row(name, f"{case} n={n}", error / first[decoder], "times LLL's"))
    return rows


def shortest_vectors(quick: bool) -> tuple[list[dict[str, Any]], list[Claim]]:
    """Exact shortest vectors of random lattices, up to the dimension where ``shortest`` refuses."""
    from cllm import lattice
    from cllm.lattice.shortest import EXACT_LIMIT

    rows, slowest = [], 0.0
    dimensions = (20,) if quick else (40, 50, EXACT_LIMIT)
    for n in dimensions:
        started = time.perf_counter()
        found = lattice.shortest(q_ary(n, 1009, n))
        slowest = time.perf_counter() - started
        rows.append(row("shortest vector", f"q-ary n={n}, exact", slowest, "s"))
        rows.append(row("shortest vector", f"q-ary n={n}, exact", found.ratio, "of heuristic"))
    claim = Claim(
        name=f"exact shortest vector at n={dimensions[-1]}, seconds",
        value=slowest,
        required=60.0,
        higher_is_better=False,
    )
    return rows, [claim]

"""What reduction reaches and what it is for; what Gram–Schmidt loses."""

from __future__ import annotations

from typing import Any

import numpy as np

from cllm.bench.harness import Claim
from cllm.bench.lattice_contestant import Reached, reduce_or_kill, reduce_timed
from cllm.bench.lattice_reduction import covariance_lattice, q_ary
from cllm.bench.lattice_timing import row

# BKZ begins no tour after so many seconds, LLL's included.
LIMIT = 8.0
# From this dimension on LLL or one tour may take minutes: their process is ended after so many seconds.
LONG, KILL_AFTER = 256, 60.0

METHODS = (("LLL", "lll", 20), ("BKZ-20", "bkz", 20), ("BKZ-40", "bkz", 40))
"""Name, method and block size."""


def quality(quick: bool) -> tuple[list[dict[str, Any]], list[Claim]]:
    """Time, root Hermite factor and flatness of LLL and BKZ; what each method does for decoding."""
    rows = []
    for n in (16, 24) if quick else (32, 64, 128, 256):
        for kind, B in (("covariance", covariance_lattice(n)), ("q-ary", q_ary(n, 1009, 1))):
            rows += _reductions(f"{kind} n={n}", B, 1.0 if quick else LIMIT)
    return rows + _decoding_error(16 if quick else 64, 500 if quick else 20_000), []


def _reductions(case: str, B: np.ndarray, limit: float) -> list[dict[str, Any]]:
    """LLL of B, then BKZ of LLL's basis: the seconds of BKZ come on top of LLL's."""
    rows = []
    basis = B
    for name, method, block in METHODS:
        box = None if method == "lll" else limit
        if len(B) < LONG:
            made: tuple[Reached, np.ndarray] | None = reduce_timed(basis, method, block, box)
        else:
            made = reduce_or_kill(basis, method, block, box, KILL_AFTER)
        if made is None:
            rows.append(row(name, f"{case}, not done in {KILL_AFTER:.0f} s", None, "s"))
            if method == "lll":
                return rows
            continue
        reached, reduced = made
        if method == "lll":
            basis = reduced
        label = case + ("" if method == "lll" else ", after LLL")
        label += "" if reached.finished else f", stopped by the clock ({limit:.0f} s)"
        factor = 1000 * (reached.root_hermite_factor - 1)
        rows.append(row(name, label, reached.seconds, "s"))
        rows.append(row(name, label, factor, "‰, root Hermite factor above 1"))
        rows.append(row(name, label, reached.mean_ratio_db, "dB over flat"))
    return rows


def _decoding_error(n: int, count: int) -> list[dict[str, Any]]:
    """Mean squared error of uniform targets after each reduction, over that after LLL; and Seysen's
    own measure, which says nothing of it."""
    from cllm import lattice
    from cllm.lattice.seysen import seysen_measure

    rows = []
    for case, B in (("covariance", covariance_lattice(n)), ("q-ary", q_ary(n, 1009, 1))):
        T = np.random.default_rng(0).uniform(-3, 3, (count, n)) @ B
        first: dict[str, float] = {}
        for method in ("lll", "seysen", "deep", "bkz"):
            basis = lattice.reduce(B, method).basis
            found = {"Seysen's measure": seysen_measure(np.asarray(basis, dtype=np.float64))}
            for decoder in ("rounding", "nearest-plane"):
                distances = lattice.closest(basis, T, decoder).distances
                found[f"error of {decoder}"] = float((distances**2).mean())
            for what, value in found.items():
                first.setdefault(what, value)
                name = f"{what} after {method}"
                rows.append(row(name, f"{case} n={n}", value / first[what], "times LLL's"))
    return rows


def orthogonality(quick: bool) -> tuple[list[dict[str, Any]], list[Claim]]:
    """‖QQᵀ - I‖ of the three Gram–Schmidt methods as the basis gets worse."""
    from cllm.lattice.gso import METHODS as GRAM_SCHMIDT
    from cllm.lattice.gso import lq

    n = 12 if quick else 64
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((n, n)))[0] for _ in range(2))
    rows = []
    for power in (3, 6, 9, 12):
        B = left @ np.diag(np.geomspace(1, 10.0**-power, n)) @ right
        for method in GRAM_SCHMIDT:
            _, Q = lq(B, method)
            loss = float(np.linalg.norm(Q @ Q.T - np.eye(n)))
            case = f"condition 1e{power}, n={n}"
            rows.append(row(f"Gram–Schmidt, {method}", case, loss, "orthogonality lost"))
    return rows, []

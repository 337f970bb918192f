"""Closest vectors: nearest plane, K-best, E8 and Leech, in targets a second."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from cllm.bench.harness import Claim
from cllm.bench.lattice_reduction import covariance_lattice
from cllm.bench.lattice_timing import medians, row


def planes(quick: bool) -> tuple[list[dict[str, Any]], list[Claim]]:
    """Nearest plane against fpylll and the machine's matrix product; K-best against nearest plane."""
    from cllm import lattice

    rows: list[dict[str, Any]] = []
    claims: list[Claim] = []
    sizes = (
        ((16, 500, 0.05), (32, 500, 0.25)) if quick else ((64, 100_000, 0.05), (512, 100_000, 0.25))
    )
    for n, count, share in sizes:
        B = covariance_lattice(n) + np.eye(n)
        T = torch.randn(count, n, generator=torch.Generator().manual_seed(0)) * 20
        square = torch.randn(2048, 2048)
        rounds = 3 if quick or n > 100 else 5
        seconds = medians(
            {"ours": lambda B=B, T=T: lattice.closest(B, T), "product": lambda: square @ square},
            rounds,
        )
        rate = count / seconds["ours"]
        theirs = _fpylll_rate(B, 10 if n > 100 else 200)
        product = 2 * 2048**3 / seconds["product"]
        case = f"n={n}, {count} float32 targets"
        rows.append(row("nearest plane", case, rate, "targets/s", "GSO.Mat.babai", theirs))
        rows.append(
            row("nearest plane", case, 5 * n * n * rate / 1e9, "Gflop/s", "matmul", product / 1e9)
        )
        claims.append(
            Claim(
                name=f"nearest plane n={n} over fpylll, times", value=rate / theirs, required=100.0
            )
        )
        claims.append(
            Claim(
                name=f"nearest plane n={n}, share of the float32 matmul rate",
                value=5 * n * n * rate / product,
                required=share,
            )
        )
    more_rows, claim = _k_best(16 if quick else 64, 500 if quick else 20_000)
    return rows + more_rows, [*claims, claim]


def _fpylll_rate(B: np.ndarray, count: int) -> float:
    """Targets a second of a loop over ``GSO.Mat.babai``, its Gram–Schmidt data prepared."""
    from fpylll import GSO

    from cllm.lattice.integers import to_fplll, to_integers

    scaled = to_integers(B)
    gso = GSO.Mat(to_fplll(scaled.rows), float_type="d")
    gso.update_gso()
    T = np.random.default_rng(0).standard_normal((count, len(B))) * 20 * 2.0**scaled.bits
    targets = [tuple(t) for t in T.tolist()]
    started = time.perf_counter()
    for target in targets:
        gso.babai(target)
    return count / (time.perf_counter() - started)


def _k_best(n: int, count: int) -> tuple[list[dict[str, Any]], Claim]:
    from cllm import lattice

    B = lattice.reduce(covariance_lattice(n)).basis
    T = torch.rand(count, n, generator=torch.Generator().manual_seed(0)) * 40
    T = T @ torch.from_numpy(B).float()
    seconds = medians(
        {
            "plane": lambda: lattice.closest(B, T),
            "beam": lambda: lattice.closest(B, T, "k-best", K=16),
        },
        5,
    )
    errors = [
        float(lattice.closest(B, T, method).distances.square().mean())
        for method in ("nearest-plane", "k-best")
    ]
    case = f"n={n}, {count} float32 targets"
    rows = [
        row(
            "K-best, K=16",
            case,
            count / seconds["beam"],
            "targets/s",
            "nearest plane",
            count / seconds["plane"],
        ),
        row("K-best, K=16", case, errors[1] / errors[0], "of nearest plane's squared error"),
    ]
    claim = Claim(
        name="K-best with K=16 over nearest plane, times",
        value=seconds["beam"] / seconds["plane"],
        required=25.0,
        higher_is_better=False,
    )
    return rows, claim


def root_lattices(quick: bool) -> tuple[list[dict[str, Any]], list[Claim]]:
    """Points a second of E8 on one thread and Leech on all; the second moments they show."""
    from cllm import lattice

    generator = torch.Generator().manual_seed(0)
    eights = torch.randn(2_000 if quick else 4_000_000, 8, generator=generator) * 2
    leeches = torch.randn(500 if quick else 100_000, 24, generator=generator) * 2
    e8, leech = lattice.E8(), lattice.Leech()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one = medians({"e8": lambda: e8.nearest(eights), "copy": lambda: eights.clone()}, 5)
        single = medians({"leech": lambda: leech.nearest(leeches)}, 3)["leech"]
    finally:
        torch.set_num_threads(threads)
    every = medians({"leech": lambda: leech.nearest(leeches)}, 5)["leech"]
    rows = [
        row(
            "E8",
            "one thread",
            len(eights) / one["e8"],
            "points/s",
            "copy",
            len(eights) / one["copy"],
        ),
        row("Leech", "one thread", len(leeches) / single, "points/s"),
        row("Leech", f"{threads} threads", len(leeches) / every, "points/s"),
    ]
    claims = [
        Claim(name="E8 points/s a core", value=len(eights) / one["e8"], required=10e6, aim=50e6),
        Claim(name="Leech points/s", value=len(leeches) / min(every, single), required=200e3),
    ]
    return rows, claims

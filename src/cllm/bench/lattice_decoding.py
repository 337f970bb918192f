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
    rows: list[dict[str, Any]] = []
    claims: list[Claim] = []
    full = ((64, 100_000, 0.05), (512, 100_000, 0.25))
    for n, count, share in ((16, 500, 0.05), (32, 500, 0.25)) if quick else full:
        rate, product = _plane_rate(n, count)
        theirs = _fpylll_rate(_plane_basis(n), 10 if n > 100 else 200)
        case = f"n={n}, {count} float32 targets"
        work = 5 * n * n * rate
        rows.append(row("nearest plane", case, rate, "targets/s", "GSO.Mat.babai", theirs))
        rows.append(row("nearest plane", case, work / 1e9, "Gflop/s", "matmul", product / 1e9))
        name = f"nearest plane n={n}"
        claims.append(Claim(name=f"{name} over fpylll, times", value=rate / theirs, required=100.0))
        claims.append(
            Claim(
                name=f"{name}, share of the float32 matmul rate",
                value=work / product,
                required=share,
            )
        )
    for n, count in ((16, 500), (24, 200)) if quick else ((64, 20_000), (512, 4_000)):
        more_rows, claim = _k_best(n, count)
        rows += more_rows
        claims.append(claim)
    return rows, claims


def _plane_basis(n: int) -> np.ndarray:
    return covariance_lattice(n) + np.eye(n)


def _plane_rate(n: int, count: int) -> tuple[float, float]:
    """Targets a second of nearest plane, and this machine's float32 product in flop a second."""
    from cllm import lattice

    B = _plane_basis(n)
    T = torch.randn(count, n, generator=torch.Generator().manual_seed(0)) * 20
    square = torch.randn(2048, 2048)
    contestants = {"ours": lambda: lattice.closest(B, T), "product": lambda: square @ square}
    seconds = medians(contestants, 5)
    return count / seconds["ours"], 2 * 2048**3 / seconds["product"]


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

    B = _plane_basis(n)
    T = torch.rand(count, n, generator=torch.Generator().manual_seed(0)) * 40
    T = T @ torch.from_numpy(B).float()
    seconds = medians(
        {
            "plane": lambda: lattice.closest(B, T),
            "beam": lambda: lattice.closest(B, T, "k-best", K=16),
            "compiled": lambda: lattice.closest(B, T, "k-best", K=16, compiled=True),
        },
        5,
    )
    errors = [
        float(lattice.closest(B, T, method).distances.square().mean())
        for method in ("nearest-plane", "k-best")
    ]
    case = f"n={n}, {count} float32 targets"
    beam, plane = count / seconds["beam"], count / seconds["plane"]
    share = errors[1] / errors[0]
    rows = [
        row("K-best, K=16", case, beam, "targets/s", "nearest plane", plane),
        row("K-best, K=16, compiled", case, count / seconds["compiled"], "targets/s"),
        row("K-best, K=16", case, share, "of nearest plane's squared error"),
    ]
    claim = Claim(
        name=f"K-best n={n} with K=16 over nearest plane, times",
        value=min(seconds["beam"], seconds["compiled"]) / seconds["plane"],
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

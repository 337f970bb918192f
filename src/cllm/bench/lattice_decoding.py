"""Closest vectors: nearest plane, K-best, E8 and Leech, in targets a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from cllm.bench.harness import Claim
from cllm.bench.lattice_reduction import covariance_lattice
from cllm.bench.lattice_timing import medians, row, torch_threads
from cllm.core.cpu import usable_threads


def planes(quick: bool) -> tuple[list[dict[str, Any]], list[Claim]]:
    """Nearest plane against fpylll's and the machine's matrix product, in turns."""
    rows: list[dict[str, Any]] = []
    claims: list[Claim] = []
    full = ((64, 100_000, 200, 0.05), (512, 100_000, 10, 0.25))
    for n, count, few, share in ((16, 500, 20, 0.05), (32, 500, 10, 0.25)) if quick else full:
        rate, whole, product, theirs = _plane_rates(n, count, few)
        case, threads = f"n={n}, {count} float32 targets", usable_threads()
        work = 5 * n * n * rate
        rows.append(row("nearest plane", case, rate, "targets/s", "GSO.Mat.babai", theirs))
        several = f"n={n}, all threads ({threads})"
        rows.append(row("nearest plane", several, whole, "targets/s", "GSO.Mat.babai", theirs))
        rows.append(row("nearest plane", case, work / 1e9, "Gflop/s", "matmul", product / 1e9))
        name = f"nearest plane n={n}"
        over = f"{name}, {threads} threads, over a loop of fpylll's, times"
        claims.append(Claim(name=over, value=whole / theirs, required=100.0))
        claims.append(
            Claim(
                name=f"{name}, share of the float32 matmul rate",
                value=work / product,
                required=share,
            )
        )
    return rows, claims


def beams(quick: bool) -> tuple[list[dict[str, Any]], list[Claim]]:
    """K-best against nearest plane."""
    rows: list[dict[str, Any]] = []
    claims: list[Claim] = []
    for n, count in ((16, 500), (24, 200)) if quick else ((64, 20_000), (512, 4_000)):
        more_rows, claim = _k_best(n, count)
        rows += more_rows
        claims.append(claim)
    return rows, claims


def _plane_basis(n: int) -> np.ndarray:
    return covariance_lattice(n) + np.eye(n)


def _plane_rates(n: int, count: int, few: int) -> tuple[float, float, float, float]:
    """Targets a second of nearest plane on one thread and on all, one thread's float32 product in flop a
    second, and targets a second of a loop over ``GSO.Mat.babai`` on ``few`` of them."""
    from cllm import lattice

    B = _plane_basis(n)
    T = torch.randn(count, n, generator=torch.Generator().manual_seed(0)) * 20
    square = torch.randn(2048, 2048)

    def on_all() -> None:
        with torch_threads(usable_threads()):
            lattice.closest(B, T)

    contestants: dict[str, Callable[[], object]] = {
        "ours": lambda: lattice.closest(B, T),
        "all": on_all,
        "product": lambda: square @ square,
        "fpylll": _fpylll_loop(B, T[:few].double().numpy()),
    }
    seconds = medians(contestants)
    ours, whole = count / seconds["ours"], count / seconds["all"]
    return ours, whole, 2 * 2048**3 / seconds["product"], few / seconds["fpylll"]


def _fpylll_loop(B: np.ndarray, targets: np.ndarray) -> Callable[[], None]:
    """A loop over ``GSO.Mat.babai``, its Gram–Schmidt data and its targets prepared."""
    from fpylll import GSO

    from cllm.lattice.integers import to_fplll, to_integers

    scaled = to_integers(B)
    gso = GSO.Mat(to_fplll(scaled.rows), float_type="d")
    gso.update_gso()
    prepared = [tuple(t) for t in (targets * 2.0**scaled.bits).tolist()]

    def loop() -> None:
        for target in prepared:
            gso.babai(target)

    return loop


def _k_best(n: int, count: int) -> tuple[list[dict[str, Any]], Claim]:
    from cllm import lattice

    B = _plane_basis(n)
    T = torch.rand(count, n, generator=torch.Generator().manual_seed(0)) * 40
    T = T @ torch.from_numpy(B).float()
    few = T[: count // 10]
    seconds = medians(
        {
            "plane": lambda: lattice.closest(B, T),
            "beam": lambda: lattice.closest(B, T, "k-best", K=16),
            "passes": lambda: lattice.closest(B, few, "k-best", K=16, kernel=False),
        }
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
        row("K-best, K=16, no compiler", case, len(few) / seconds["passes"], "targets/s"),
        row("K-best, K=16", case, share, "of nearest plane's squared error"),
    ]
    claim = Claim(
        name=f"K-best n={n} with K=16 over nearest plane, times",
        value=seconds["beam"] / seconds["plane"],
        required=25.0,
        higher_is_better=False,
    )
    return rows, claim


def root_lattices(quick: bool) -> tuple[list[dict[str, Any]], list[Claim]]:
    """Points a second of E8 and Leech, beside a plain copy of the points; Leech on all threads, too."""
    from cllm import lattice

    generator = torch.Generator().manual_seed(0)
    eights = torch.randn(2_000 if quick else 4_000_000, 8, generator=generator) * 2
    leeches = torch.randn(500 if quick else 100_000, 24, generator=generator) * 2
    e8, leech = lattice.E8(), lattice.Leech()
    everyone = usable_threads()

    def on_all() -> None:
        with torch_threads(everyone):
            leech.nearest(leeches)

    small = medians({"e8": lambda: e8.nearest(eights), "copy": lambda: eights.clone()})
    contestants: dict[str, Callable[[], object]] = {
        "one": lambda: leech.nearest(leeches),
        "copy": lambda: leeches.clone(),
    }
    if everyone > 1:
        contestants["all"] = on_all
    large = medians(contestants)
    e8_rate, e8_copy = (len(eights) / small[name] for name in ("e8", "copy"))
    one, copy = (len(leeches) / large[name] for name in ("one", "copy"))
    rows = [
        row("E8", "1 thread", e8_rate, "points/s", "copy", e8_copy),
        row("Leech", "1 thread", one, "points/s", "copy", copy),
    ]
    whole = one
    if everyone > 1:
        whole = len(leeches) / large["all"]
        rows.append(row("Leech", f"all threads ({everyone})", whole, "points/s"))
    claims = [
        Claim(name="E8 points/s a core", value=e8_rate, required=10e6, aim=50e6),
        # Required of the machine, where E8's figure is required of a core.
        Claim(name=f"Leech points/s, {everyone} threads", value=whole, required=200e3),
    ]
    return rows, claims

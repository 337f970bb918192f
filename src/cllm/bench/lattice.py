"""``cllm bench lattice``: reduction, decoders, codes and spirals, beside what else does the job."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from time import perf_counter
from typing import Any

from cllm.bench.harness import Claim, Options, Result, load_now
from cllm.core.cpu import is_busy

Part = tuple[list[dict[str, Any]], list[Claim]]


def run(options: Options) -> Result:
    """All measurements; ``quick`` makes every case small and its figures meaningless."""
    import torch

    from cllm.bench import (
        lattice_decoding,
        lattice_numbers,
        lattice_quality,
        lattice_reduction,
    )
    from cllm.bench.lattice_timing import ROUNDS, torch_threads

    load, busy = load_now(), is_busy()
    parts: list[Callable[[bool], Part]] = [
        lattice_reduction.speed,
        lattice_decoding.planes,
        lattice_decoding.beams,
        lattice_decoding.root_lattices,
        lattice_numbers.spiral,
        lattice_numbers.codes,
        lattice_quality.orthogonality,
        lattice_quality.quality,
        lattice_reduction.shortest_vectors,
    ]
    rows: list[dict[str, Any]] = []
    claims: list[Claim] = []
    took: list[str] = []
    with torch_threads(1):
        threads = torch.get_num_threads()
        for part in parts:
            started = perf_counter()
            new_rows, new_claims = part(options.quick)
            rows += new_rows
            claims += new_claims
            took.append(f"{part.__name__} {perf_counter() - started:.0f}")
    why = "quick: too small to judge" if options.quick else busy
    if why:
        claims = [replace(claim, judged=False, why=why) for claim in claims]
    return Result(
        bench="lattice",
        rows=rows,
        claims=claims,
        notes=[
            f"torch ran on {threads} thread, except where the row says otherwise; fplll and the"
            " spirals know no other number. NumPy's own products (in verification and similarity) run"
            " on as many as its BLAS takes.",
            f"Compared rates are medians of {ROUNDS} interleaved rounds or more, the warm-up apart."
            " Reductions to compare bases, and shortest vectors, are done once.",
            "Rates of nearest-plane count the products it does: projection, back-substitution and"
            " points, 5n² floating-point operations a target.",
            "Where no vector shorter than q was found, the root Hermite factor of a q-ary lattice is that"
            " of the rows of q it begins with, q^(1/2n).",
            f"Seconds of each part: {', '.join(took)}.",
        ],
        packages=("numpy", "torch", "scipy", "fpylll", "sympy"),
        load_before=load,
        busy=busy or "",
    )

"""``cllm bench lattice``: reduction, decoders, codes and spirals, beside what else does the job."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from cllm.bench.harness import Claim, Options, Result, load_now

Part = tuple[list[dict[str, Any]], list[Claim]]


def run(options: Options) -> Result:
    """All measurements; ``quick`` makes every case small and its figures meaningless."""
    from cllm.bench import lattice_decoding, lattice_numbers, lattice_reduction

    load = load_now()
    parts: list[Callable[[bool], Part]] = [
        lattice_reduction.speed,
        lattice_decoding.planes,
        lattice_decoding.root_lattices,
        lattice_numbers.spiral,
        lattice_numbers.codes,
        lattice_reduction.quality,
        lattice_reduction.shortest_vectors,
    ]
    rows: list[dict[str, Any]] = []
    claims: list[Claim] = []
    for part in parts:
        new_rows, new_claims = part(options.quick)
        rows += new_rows
        claims += new_claims
    if options.quick:
        claims = [replace(claim, judged=False, why="quick: too small to judge") for claim in claims]
    return Result(
        bench="lattice",
        rows=rows,
        claims=claims,
        notes=[
            "Rates of nearest-plane count the products it does: projection, back-substitution and"
            " points, 5n² floating-point operations a target.",
        ],
        packages=("numpy", "torch", "scipy", "fpylll", "sympy"),
        load_before=load,
    )

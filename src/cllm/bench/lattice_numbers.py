"""Ulam coordinates, and what the factor cache gains or loses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from cllm.bench.harness import Claim
from cllm.bench.lattice_timing import medians, row


def spiral(quick: bool) -> tuple[list[dict[str, Any]], list[Claim]]:
    """Ulam coordinates a second."""
    from cllm import lattice

    n = np.arange(1, 1_000 if quick else 20_000_001)
    x, y = lattice.ulam(n)
    seconds = medians({"there": lambda: lattice.ulam(n), "back": lambda: lattice.ulam_number(x, y)})
    rows = [
        row("Ulam n to (x, y)", f"{len(n)} numbers", len(n) / seconds["there"], "numbers/s"),
        row("Ulam (x, y) to n", f"{len(n)} numbers", len(n) / seconds["back"], "numbers/s"),
    ]
    claim = Claim(name="Ulam coordinates/s", value=len(n) / seconds["there"], required=100e6)
    return rows, [claim]


def token_codes(count: int, seed: int = 0) -> Any:
    """Codes as a byte-pair vocabulary has them: bytes and earlier tokens by Zipf's law, and itself."""
    from cllm import lattice

    rng = np.random.default_rng(seed)
    primes = lattice.nth_primes(count).tolist()
    factors = []
    for i in range(count):
        size = int(rng.integers(2, 10))
        pieces = [*(rng.zipf(1.4, size) % min(256, count)), *(rng.zipf(1.2, size) % (i + 1)), i]
        names, times = np.unique(pieces, return_counts=True)
        factors.append({primes[int(p)]: int(t) for p, t in zip(names, times, strict=True)})
    return lattice.Codes.from_factors(factors)


def codes(quick: bool) -> tuple[list[dict[str, Any]], list[Claim]]:
    """Similarity of all token pairs; gcd and factoring against ``math.gcd`` and sympy."""
    from cllm import lattice

    count = 64 if quick else 4096
    tokens = token_codes(count)
    integers = tokens.integers()
    few = integers[: 16 if quick else 256]

    def by_gcd() -> list[float]:
        logs = [math.log(n) for n in few]
        out = []
        for i, a in enumerate(few):
            for j, b in enumerate(few):
                g = math.log(math.gcd(a, b))
                out.append(g / (logs[i] + logs[j] - g))
        return out

    seconds = medians({"ours": lambda: lattice.similarity(tokens), "math": by_gcd})
    rate, theirs = count**2 / seconds["ours"], len(few) ** 2 / seconds["math"]
    rows = [row("similarity", f"{count}×{count} tokens", rate, "pairs/s", "math.gcd", theirs)]
    rows += _factor_cache(200 if quick else 20_000)
    claim = Claim(
        name=f"similarity of {count}×{count} token pairs, seconds",
        value=seconds["ours"],
        required=2.0,
        higher_is_better=False,
    )
    return rows, [claim]


def _factor_cache(count: int) -> list[dict[str, Any]]:
    """The same integers through the cache, ``math.gcd``, ``np.gcd`` and sympy."""
    from cllm import lattice

    rng = np.random.default_rng(0)
    limit = 1 << 20
    cache = lattice.FactorCache(limit)
    a, b = (rng.integers(1, limit + 1, count) for _ in range(2))
    codes_a, codes_b = cache.codes(a), cache.codes(b)
    pairs = list(zip(a.tolist(), b.tolist(), strict=True))
    contestants: dict[str, Callable[[], Any]] = {
        "meet": lambda: lattice.meet(codes_a, codes_b),
        "factor and meet": lambda: lattice.meet(cache.codes(a), cache.codes(b)),
        "math.gcd": lambda: [math.gcd(x, y) for x, y in pairs],
        "np.gcd": lambda: np.gcd(a, b),
        "codes": lambda: cache.codes(a),
        "one by one": lambda: [cache.factor(x) for x, _ in pairs],
    }
    few = a[: max(1, count // 20)].tolist()
    large = rng.integers(2**62, 2**63 - 1, 5 if count < 1000 else 100).tolist()
    sizes = dict.fromkeys(contestants, count)
    contestants["large"] = lambda: [cache.factor(x) for x in large]
    sizes["large"] = len(large)
    factorint = _factorint()
    if factorint is not None:
        contestants["sympy"] = lambda: [factorint(x) for x in few]
        contestants["large, sympy"] = lambda: [factorint(x) for x in large]
        sizes |= {"sympy": len(few), "large, sympy": len(large)}
    seconds = medians(contestants)
    rate = {name: size / seconds[name] for name, size in sizes.items()}
    case, far = f"{count} pairs below 2^20", f"{len(large)} numbers"
    table = [
        ("gcd of codes in hand", case, "meet", "pairs/s", "math.gcd"),
        ("gcd of codes in hand", case, "meet", "pairs/s", "np.gcd"),
        ("factor, then gcd", case, "factor and meet", "pairs/s", "math.gcd"),
        ("factor, batched", case, "codes", "numbers/s", "sympy"),
        ("factor, one by one", case, "one by one", "numbers/s", "sympy"),
        ("factor near 2^63", far, "large", "numbers/s", "large, sympy"),
    ]
    return [
        row(
            job,
            size,
            rate[ours],
            unit,
            "sympy.factorint" if "sympy" in peer else peer,
            rate.get(peer),
        )
        for job, size, ours, unit, peer in table
    ]


def _factorint() -> Callable[[int], dict[int, int]] | None:
    """sympy's, or ``None`` where sympy is not installed."""
    try:
        from sympy import factorint
    except ImportError:
        return None
    found: Callable[[int], dict[int, int]] = factorint
    return found

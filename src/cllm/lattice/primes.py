"""Primes: a sieve with smallest prime factors, the n-th prime, and exact factoring below 2^63."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

LARGEST = 2**63 - 1

# Sieves above these sizes would take gigabytes: a byte and four bytes a number.
SIEVE_LIMIT = 2**31
TABLE_LIMIT = 2**28


def primes_below(limit: int) -> np.ndarray:
    """All primes < ``limit``, int64 ascending (Eratosthenes on odd numbers).

    Raises:
        ValueError: ``limit`` above ``SIEVE_LIMIT``, or not an integer.
    """
    limit = _integer(limit)
    if limit > SIEVE_LIMIT:
        raise ValueError(f"a sieve to {limit} is beyond the limit {SIEVE_LIMIT}")
    if limit <= 2:
        return np.empty(0, dtype=np.int64)
    odd = np.ones(limit // 2, dtype=bool)
    for p in range(3, math.isqrt(limit - 1) + 1, 2):
        if odd[p // 2]:
            odd[p * p // 2 :: p] = False
    odd[0] = False
    return np.concatenate([np.array([2]), 2 * np.flatnonzero(odd) + 1])


def nth_primes(count: int) -> np.ndarray:
    """The first ``count`` primes, int64: p_1 = 2, p_2 = 3, ...

    The sieve's size is Rosser & Schoenfeld's bound p_n < n(ln n + ln ln n) for n ≥ 6
    ("Approximate formulas for some functions of prime numbers", Illinois J. Math. 1962, theorem 3).
    """
    count = _integer(count)
    if count < 0:
        raise ValueError(f"count of primes must not be negative, got {count}")
    n = max(count, 6)
    bound = int(n * (math.log(n) + math.log(math.log(n)))) + 2
    return primes_below(bound)[:count]


def nth_prime(n: int) -> int:
    """The n-th prime, n ≥ 1: nth_prime(1) = 2.

    Raises:
        ValueError: n below 1 or not an integer, or a prime beyond the sieve's ``SIEVE_LIMIT``.
    """
    n = _integer(n)
    if n < 1:
        raise ValueError(f"n-th prime needs n of at least 1, got {n}")
    return int(nth_primes(n)[-1])


def smallest_factors(limit: int) -> np.ndarray:
    """Table spf (limit + 1,) uint32: the smallest prime factor of every n ≥ 2; spf[0] = 0, spf[1] = 1.

    Raises:
        ValueError: ``limit`` below 1 or above ``TABLE_LIMIT``.
    """
    limit = _integer(limit)
    if not 1 <= limit <= TABLE_LIMIT:
        raise ValueError(f"limit of a factor table must lie in [1, {TABLE_LIMIT}], got {limit}")
    spf = np.arange(limit + 1, dtype=np.uint32)
    # Large primes first: whatever a smaller prime divides, it overwrites.
    for p in primes_below(math.isqrt(limit) + 1)[::-1].tolist():
        spf[p * p :: p] = p
    return spf


def is_prime(n: Any) -> bool:
    """Whether n is prime; exact for n < 2^64 (Miller–Rabin with the first twelve primes as bases:
    Sorenson & Webster, "Strong pseudoprimes to twelve prime bases", Math. Comp. 2017).

    Raises:
        ValueError: not an integer, or 2^64 and above, where this would be a guess.
    """
    n = _integer(n)
    if n >= 2**64:
        raise ValueError(f"{n} is not below 2^64: primality would not be exact")
    bases = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
    if n < 2:
        return False
    for p in bases:
        if n % p == 0:
            return n == p
    shift = ((n - 1) & (1 - n)).bit_length() - 1
    odd = (n - 1) >> shift
    return all(_passes(n, a, odd, shift) for a in bases)


def _passes(n: int, base: int, odd: int, shift: int) -> bool:
    x = pow(base, odd, n)
    if x in (1, n - 1):
        return True
    for _ in range(shift - 1):
        x = x * x % n
        if x == n - 1:
            return True
    return False


def factor(n: Any) -> dict[int, int]:
    """{prime: exponent} of 1 ≤ n < 2^63, by trial division and Pollard's rho (BIT 1975, in Brent's
    form, BIT 1980).

    Raises:
        ValueError: n out of range.
    """
    n = check_range(n)
    found: dict[int, int] = {}
    for p in _SMALL:
        while n % p == 0:
            found[p] = found.get(p, 0) + 1
            n //= p
    pending = [n] if n > 1 else []
    while pending:
        m = pending.pop()
        if is_prime(m):
            found[m] = found.get(m, 0) + 1
        else:
            d = _rho(m)
            pending += [d, m // d]
    return dict(sorted(found.items()))


def check_range(n: Any) -> int:
    """n as an int in [1, 2^63), or ``ValueError``."""
    n = _integer(n)
    if not 1 <= n <= LARGEST:
        raise ValueError(f"{n} is outside [1, 2^63): keep larger codes as factors")
    return n


def _integer(n: Any) -> int:
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)):
        raise ValueError(f"expected an integer, got {n!r}")
    return int(n)


_SMALL = tuple(primes_below(1000).tolist())


def _rho(n: int) -> int:
    """A proper factor of an odd composite n."""
    root = math.isqrt(n)
    if root * root == n:
        return root
    for c in range(1, n):
        y = x = start = 2
        r, g, product = 1, 1, 1
        while g == 1:
            x = y
            for _ in range(r):
                y = (y * y + c) % n
            k = 0
            while k < r and g == 1:
                start = y
                for _ in range(min(128, r - k)):
                    y = (y * y + c) % n
                    product = product * abs(x - y) % n
                g = math.gcd(product, n)
                k += 128
            r *= 2
        if g == n:
            # The batch of 128 stepped over the factor: go through it one by one.
            g = 1
            while g == 1:
                start = (start * start + c) % n
                g = math.gcd(abs(x - start), n)
        if g != n:
            return g
    raise AssertionError(f"{n} is composite and has a factor")

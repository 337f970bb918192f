"""The divisor lattice: positive integers under divisibility, as factor sets in CSR form.

meet is gcd (least exponents), join is lcm (greatest). An integer is never multiplied out unless
asked: codes are arrays of (prime, exponent), so they may be far beyond 2^63.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cllm.lattice.primes import LARGEST, check_range, factor, is_prime, smallest_factors


@dataclass(frozen=True)
class Codes:
    """A batch of positive integers as sorted prime factors.

    Attributes:
        offsets: (count + 1,) int64; code i has factors offsets[i] to offsets[i + 1].
        primes: (total,) int64, strictly ascending in every code.
        exponents: (total,) int64, at least 1.
    """

    offsets: np.ndarray
    primes: np.ndarray
    exponents: np.ndarray

    def __post_init__(self) -> None:
        shapes = (self.offsets.shape, self.primes.shape, self.exponents.shape)
        flat = self.offsets.ndim == self.primes.ndim == 1 and len(self.offsets) >= 1
        if not flat or self.primes.shape != self.exponents.shape:
            raise ValueError(f"codes need offsets, primes and exponents of one size, got {shapes}")
        ends = self.offsets[0] == 0 and self.offsets[-1] == len(self.primes)
        if not ends or (np.diff(self.offsets) < 0).any():
            raise ValueError(f"offsets do not partition the factors of codes of shape {shapes}")
        if len(self.primes) and (self.exponents.min() < 1 or self.primes.min() < 2):
            raise ValueError(f"codes of shape {shapes} need primes ≥ 2 and exponents ≥ 1")
        rising = np.diff(self.primes) > 0
        starts = self.offsets[1:-1]
        rising[starts[(starts > 0) & (starts < len(self.primes))] - 1] = True
        if not rising.all():
            raise ValueError(f"primes of codes of shape {shapes} must ascend in every code")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> dict[int, int]:
        """{prime: exponent} of code i."""
        part = slice(self.offsets[i], self.offsets[i + 1]) if i >= 0 else None
        if part is None or i >= len(self):
            raise IndexError(f"code {i} of {len(self)}")
        return dict(zip(self.primes[part].tolist(), self.exponents[part].tolist(), strict=True))

    @staticmethod
    def from_factors(factors: Iterable[Mapping[int, int]]) -> Codes:
        """From {prime: exponent} mappings; every key must be a prime below 2^63.

        Raises:
            ValueError: a key that is not prime, or an exponent below 1.
        """
        offsets, primes, exponents = [0], [], []
        for mapping in factors:
            for p, e in sorted(mapping.items()):
                primes.append(check_range(p))
                exponents.append(check_range(e))
            offsets.append(len(primes))
        for p in set(primes):
            if not is_prime(p):
                raise ValueError(f"{p} is not prime")
        arrays = (np.array(a, dtype=np.int64) for a in (offsets, primes, exponents))
        return Codes(*arrays)

    def take(self, indices: Any) -> Codes:
        """The codes at ``indices`` (n,), in that order; repeats are allowed.

        Raises:
            IndexError: an index out of [0, count).
        """
        indices = np.asarray(indices, dtype=np.int64)
        if len(indices) and not (indices.min() >= 0 and indices.max() < len(self)):
            raise IndexError(f"indices of {len(self)} codes must lie in [0, {len(self)})")
        lengths = np.diff(self.offsets)[indices]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        where = np.arange(offsets[-1]) + np.repeat(self.offsets[indices] - offsets[:-1], lengths)
        return Codes(offsets, self.primes[where], self.exponents[where])

    def rows(self) -> np.ndarray:
        """Number of the code that each factor belongs to, (total,)."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def integers(self) -> list[int]:
        """The codes multiplied out, as Python ints of any size."""
        return [math.prod(p**e for p, e in self[i].items()) for i in range(len(self))]

    def values(self) -> np.ndarray:
        """The codes multiplied out, int64.

        Raises:
            ValueError: a code is 2^63 or more; names the first.
        """
        products = self.integers()
        for i, value in enumerate(products):
            if value > LARGEST:
                raise ValueError(f"code {i} of {len(self)} is {value}, not below 2^63")
        return np.array(products, dtype=np.int64)


class FactorCache:
    """Factors integers by table look-up: smallest prime factors up to ``limit``, beyond it exactly
    by Miller–Rabin and Pollard's rho up to 2^63.

    Args:
        limit: table size; four bytes a number.
    """

    def __init__(self, limit: int = 1 << 20) -> None:
        self.limit = limit
        self._spf = smallest_factors(limit)

    def factor(self, n: int) -> dict[int, int]:
        """{prime: exponent} of n in [1, 2^63)."""
        n = check_range(n)
        if n > self.limit:
            return factor(n)
        found: dict[int, int] = {}
        while n > 1:
            p = int(self._spf[n])
            n //= p
            found[p] = found.get(p, 0) + 1
        return found

    def codes(self, numbers: Any) -> Codes:
        """Codes of integers (count,), all in the table at once, the others one by one.

        Raises:
            ValueError: not integers in [1, 2^63), or not one-dimensional.
        """
        # A list that mixes int64 with larger integers would become floats.
        array = numbers if isinstance(numbers, np.ndarray) else np.array(numbers, dtype=object)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iuO"):
            raise ValueError(f"numbers must be integers of shape (count,), got {array.shape}")
        if array.dtype.kind in "uO":
            array = np.array([check_range(x) for x in array.tolist()], dtype=np.int64)
        array = array.astype(np.int64)
        if array.size and array.min() < 1:
            raise ValueError(f"numbers of shape {array.shape} must be at least 1")
        rest = np.where(array <= self.limit, array, 1)
        rows, primes = [], []
        alive = np.flatnonzero(rest > 1)
        while alive.size:
            p = self._spf[rest[alive]].astype(np.int64)
            rows.append(alive)
            primes.append(p)
            rest[alive] //= p
            alive = alive[rest[alive] > 1]
        for i in np.flatnonzero(array > self.limit).tolist():
            big = [p for p, e in factor(int(array[i])).items() for _ in range(e)]
            rows.append(np.full(len(big), i))
            primes.append(np.array(big, dtype=np.int64))
        empty = np.empty(0, dtype=np.int64)
        return _gather(
            len(array),
            np.concatenate([*rows, empty]),
            np.concatenate([*primes, empty]),
            np.ones(sum(map(len, rows)), dtype=np.int64),
        )


def meet(a: Codes, b: Codes) -> Codes:
    """Elementwise greatest common divisors of two batches of one length."""
    rows, primes, exponents = _both(a, b)
    same = (np.diff(rows) == 0) & (np.diff(primes) == 0)
    first = np.flatnonzero(same)
    least = np.minimum(exponents[first], exponents[first + 1])
    return _gather(len(a), rows[first], primes[first], least)


def join(a: Codes, b: Codes) -> Codes:
    """Elementwise least common multiples of two batches of one length."""
    rows, primes, exponents = _both(a, b)
    return _gather(len(a), rows, primes, exponents, largest=True)


def _both(a: Codes, b: Codes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Factors of both batches together, sorted by code and prime."""
    if len(a) != len(b):
        raise ValueError(f"batches of codes must be of one length, got {len(a)} and {len(b)}")
    rows = np.concatenate([a.rows(), b.rows()])
    primes = np.concatenate([a.primes, b.primes])
    exponents = np.concatenate([a.exponents, b.exponents])
    order = np.lexsort((primes, rows))
    return rows[order], primes[order], exponents[order]


def _gather(
    count: int, rows: np.ndarray, primes: np.ndarray, exponents: np.ndarray, largest: bool = False
) -> Codes:
    """Codes from factors in any order: equal (row, prime) are added up, or their largest taken."""
    order = np.lexsort((primes, rows))
    rows, primes, exponents = rows[order], primes[order], exponents[order]
    new = np.ones(len(rows), dtype=bool)
    new[1:] = (np.diff(rows) != 0) | (np.diff(primes) != 0)
    starts = np.flatnonzero(new)
    merge = np.maximum if largest else np.add
    merged = merge.reduceat(exponents, starts) if len(starts) else exponents
    offsets = np.concatenate([[0], np.cumsum(np.bincount(rows[starts], minlength=count))])
    return Codes(offsets.astype(np.int64), primes[starts], merged)

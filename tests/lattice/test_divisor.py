import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm import lattice
from cllm.lattice.primes import smallest_factors
from cllm.lattice.similarity import log_values

LARGEST_PRIME = 2**63 - 25
positive = st.integers(1, 2**63 - 1)
CACHE = lattice.FactorCache(10_000)


def product(factors: dict[int, int]) -> int:
    return math.prod(p**e for p, e in factors.items())


def test_primes_and_nth_prime():
    assert lattice.primes_below(2).tolist() == []
    assert lattice.primes_below(30).tolist() == [2, 3, 5, 7, 11, 13, 17, 19, 23, 29]
    # π(10^7), and p_n for powers of ten (OEIS A006988).
    assert len(lattice.primes_below(10**7)) == 664579
    for n, p in ((1, 2), (10, 29), (100, 541), (1000, 7919), (10**4, 104729), (10**6, 15485863)):
        assert lattice.nth_prime(n) == p
    assert lattice.nth_primes(5).tolist() == [2, 3, 5, 7, 11]
    assert lattice.nth_primes(0).tolist() == []


def test_is_prime():
    table = set(lattice.primes_below(5000).tolist())
    assert [n for n in range(5000) if lattice.is_prime(n)] == sorted(table)
    assert lattice.is_prime(LARGEST_PRIME)
    assert lattice.is_prime(np.int64(LARGEST_PRIME))
    assert lattice.factor(np.int64(3 * 5003)) == {3: 1, 5003: 1}
    # Strong pseudoprimes to the first three and the first nine primes (OEIS A014233).
    assert not lattice.is_prime(25326001)
    assert not lattice.is_prime(3825123056546413051)
    assert not lattice.is_prime((2**31 - 1) ** 2)


def test_table_of_smallest_factors():
    table = smallest_factors(10_000)
    for n in range(2, 10_000):
        smallest = next((p for p in range(2, math.isqrt(n) + 1) if n % p == 0), n)
        assert table[n] == smallest


@settings(max_examples=60, deadline=None)
@given(positive)
def test_factoring_is_exact_below_2_63(n):
    found = CACHE.factor(n)
    assert product(found) == n
    assert all(lattice.is_prime(p) for p in found)
    assert list(found) == sorted(found)


@pytest.mark.parametrize(
    "n",
    [
        *(1, 2, 9_999, 10_000, 10_001, 2**62, 3**39, LARGEST_PRIME, (2**31 - 1) ** 2),
        *(3037000493 * 3037000453, 1000003**3, 2**63 - 1),
    ],
)
def test_factoring_of_hard_numbers(n):
    assert product(lattice.factor(n)) == n
    assert product(CACHE.factor(n)) == n
    assert CACHE.codes([n]).integers() == [n]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 20_000), st.integers(1, 20_000)), max_size=20))
def test_meet_and_join_are_gcd_and_lcm(pairs):
    a, b = (np.array([p[i] for p in pairs], dtype=np.int64) for i in (0, 1))
    codes = [CACHE.codes(x) for x in (a, b)]
    assert codes[0].values().tolist() == a.tolist()
    assert lattice.meet(*codes).values().tolist() == np.gcd(a, b).tolist()
    assert lattice.join(*codes).values().tolist() == np.lcm(a, b).tolist()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 20_000), min_size=1, max_size=30))
def test_similarity(numbers):
    codes = CACHE.codes(numbers)
    got = lattice.similarity(codes)
    assert (got == got.T).all()
    older = lattice.gcd_over_max(codes)
    for i, a in enumerate(numbers):
        for j, b in enumerate(numbers):
            g, join = math.gcd(a, b), math.lcm(a, b)
            expected = 1.0 if join == 1 else math.log(g) / math.log(join)
            assert got[i, j] == pytest.approx(expected, abs=1e-9)
            assert (got[i, j] == 1) == (a == b)
            assert older[i, j] == pytest.approx(g / max(a, b), rel=1e-9)
    assert got.min() >= 0


def test_similarity_of_two_batches_and_of_codes_beyond_any_integer():
    p = lattice.nth_primes(200).tolist()
    huge = lattice.Codes.from_factors([dict.fromkeys(p, 2), dict.fromkeys(p[:100], 2), {}])
    assert huge.integers()[0] > 2**2000
    other = lattice.Codes.from_factors([dict.fromkeys(p[:100], 2)])
    got = lattice.similarity(huge, other)
    assert got.shape == (3, 1)
    assert got[1, 0] == 1
    assert got[2, 0] == 0
    assert got[0, 0] == pytest.approx(np.log(p[:100]).sum() / np.log(p).sum())
    assert lattice.similarity(huge)[2, 2] == 1
    assert log_values(huge)[1] == pytest.approx(math.log(math.prod(p[:100])) * 2)
    with pytest.raises(ValueError, match=r"code 0 of 3.*2\^63"):
        huge.values()
    with pytest.raises(ValueError, match="code 1 of 2"):
        lattice.similarity(lattice.Codes.from_factors([{2: 1}, {2: 20_000}]))


def test_one_shared_factor_weighs_its_information():
    """Sharing a rare piece counts for more than sharing a common one."""
    codes = lattice.Codes.from_factors([{2: 1, 101: 1, 103: 1}, {2: 1, 107: 1}, {101: 1, 107: 1}])
    got = lattice.similarity(codes)
    assert got[0, 2] > got[0, 1]


def test_codes_hold_what_they_promise():
    codes = CACHE.codes([12, 1, 30])
    assert codes.offsets.tolist() == [0, 2, 2, 5]
    assert codes[0] == {2: 2, 3: 1}
    assert codes[1] == {}
    assert len(codes) == 3
    assert len(CACHE.codes([])) == 0
    assert lattice.similarity(CACHE.codes([])).shape == (0, 0)
    with pytest.raises(IndexError):
        codes[3]
    one = np.ones(1, dtype=np.int64)
    for offsets, primes, exponents, message in (
        ([0, 1], [2, 3], [1, 1], "partition"),
        ([0, 2], [3, 2], [1, 1], "ascend"),
        ([0, 2], [2, 2], [1, 1], "ascend"),
        ([0, 1], [2], [0], "exponents"),
        ([0, 1], [2], [1, 1], "one size"),
        ([], [], [], "one size"),
    ):
        arrays = (np.array(a, dtype=one.dtype) for a in (offsets, primes, exponents))
        with pytest.raises(ValueError, match=message):
            lattice.Codes(*arrays)


def test_refusals():
    for bad in (0, -5, 2**63, 2.0, "7", True):
        with pytest.raises(ValueError, match=r"2\^63|integer"):
            CACHE.factor(bad)
    for bad in ([3, 0], np.array([3, 0])):
        with pytest.raises(ValueError, match=r"\(2,\)|0 is outside"):
            CACHE.codes(bad)
    with pytest.raises(ValueError, match=r"2\^63"):
        CACHE.codes([3, 2**63])
    with pytest.raises(ValueError, match=r"\(2, 2\)"):
        CACHE.codes([[1, 2], [3, 4]])
    with pytest.raises(ValueError, match=r"\(1,\)"):
        CACHE.codes(np.array([1.5]))
    with pytest.raises(ValueError, match="limit"):
        lattice.FactorCache(0)
    with pytest.raises(ValueError, match="limit"):
        lattice.FactorCache(2**40)
    with pytest.raises(ValueError, match="limit"):
        lattice.primes_below(2**40)
    with pytest.raises(ValueError, match="at least 1"):
        lattice.nth_prime(0)
    with pytest.raises(ValueError, match="beyond the limit"):
        lattice.nth_prime(10**12)
    with pytest.raises(ValueError, match=r"2\^64"):
        lattice.is_prime(2**64)
    for function in (lattice.nth_prime, lattice.nth_primes, lattice.primes_below, lattice.is_prime):
        for bad in (2.5, "7", None, True):
            with pytest.raises(ValueError, match="integer"):
                function(bad)
    for bad in (1.5, 0, 2**70):
        with pytest.raises(ValueError, match=r"integer|2\^63"):
            lattice.Codes.from_factors([{2: bad}])
    with pytest.raises(ValueError, match="integer"):
        lattice.FactorCache(10.5)
    with pytest.raises(ValueError, match="negative"):
        lattice.nth_primes(-1)
    with pytest.raises(ValueError, match="not prime"):
        lattice.Codes.from_factors([{4: 1}])
    with pytest.raises(ValueError, match="one length, got 1 and 2"):
        lattice.meet(CACHE.codes([1]), CACHE.codes([1, 2]))


@given(st.lists(st.integers(1, 9_999), min_size=1, max_size=8), st.data())
def test_take_picks_codes(numbers, data):
    codes = CACHE.codes(numbers)
    picks = data.draw(st.lists(st.integers(0, len(numbers) - 1), max_size=12))
    assert codes.take(picks).integers() == [numbers[i] for i in picks]
    for outside in (-1, len(numbers)):
        with pytest.raises(IndexError, match="must lie in"):
            codes.take([outside])

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm import lattice
from cllm.lattice.integers import to_float, to_integers
from cllm.lattice.modular import (
    PRIMES,
    determinant_mod,
    first_dependent_row,
    is_unimodular,
    product_equals,
)
from cllm.lattice.precision import ladder, mpfr_precision
from cllm.lattice.verify import Certificate, certify, precise_reducedness, reducedness

METHODS = ("lll", "deep", "seysen", "bkz", "hkz")


def exact_product(U: np.ndarray, B: np.ndarray) -> np.ndarray:
    return U.astype(object) @ B.astype(object)


def exact_determinant(matrix: np.ndarray) -> int:
    """Fraction-free elimination (Bareiss) in Python integers."""
    work = [[int(x) for x in row] for row in matrix]
    sign, previous = 1, 1
    for i in range(len(work) - 1):
        pivot = next((r for r in range(i, len(work)) if work[r][i]), None)
        if pivot is None:
            return 0
        if pivot != i:
            work[i], work[pivot], sign = work[pivot], work[i], -sign
        for r in range(i + 1, len(work)):
            for c in range(i + 1, len(work)):
                minor = work[r][c] * work[i][i] - work[r][i] * work[i][c]
                work[r][c] = minor // previous
        previous = work[i][i]
    return sign * work[-1][-1]


square = st.integers(2, 7).flatmap(
    lambda n: st.lists(
        st.lists(st.integers(-(10**6), 10**6), min_size=n, max_size=n), min_size=n, max_size=n
    )
)


@settings(max_examples=60, deadline=None)
@given(square, st.sampled_from(METHODS))
def test_transform_is_unimodular_and_exact(rows, method):
    B = np.array(rows, dtype=np.int64)
    determinant = exact_determinant(B)
    if determinant == 0:
        with pytest.raises(ValueError, match="row"):
            lattice.reduce(B, method)
        return
    result = lattice.reduce(B, method)
    assert abs(exact_determinant(result.transform)) == 1
    assert abs(exact_determinant(result.basis)) == abs(determinant)
    assert (exact_product(result.transform, B) == result.basis.astype(object)).all()
    if method != "seysen":
        max_mu, lovasz = reducedness(result.basis)
        assert max_mu <= 0.511
        assert lovasz >= 0.989


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 12), st.floats(-60, 60))
def test_float_bases_of_any_scale(seed, n, exponent):
    B = np.random.default_rng(seed).standard_normal((n, n + 1)) * 2.0**exponent
    result = lattice.reduce(B)
    scale = np.abs(B).max()
    np.testing.assert_allclose(result.transform @ B / scale, result.basis / scale, atol=1e-9)
    before, after = (lattice.determinant(M, log=True) for M in (B, result.basis))
    assert after == pytest.approx(before, abs=1e-9)
    assert lattice.orthogonality_defect(result.basis) <= lattice.orthogonality_defect(B) + 1e-9


@pytest.mark.parametrize("method", METHODS)
def test_deterministic(method, covariance):
    B = covariance(24, 3)
    first, second = lattice.reduce(B, method), lattice.reduce(B, method)
    assert (first.transform == second.transform).all()
    assert (first.basis == second.basis).all()


def test_lll_agrees_with_fplll(q_ary):
    from fpylll import LLL, IntegerMatrix

    B = q_ary(30, 1009, 1)
    expected = IntegerMatrix.from_matrix(B.tolist())
    LLL.reduction(expected, delta=0.99)
    got = lattice.reduce(B).basis
    assert LLL.is_reduced(IntegerMatrix.from_matrix(got.tolist()), delta=0.99)
    assert got.tolist() == [list(row) for row in expected]


def test_stronger_methods_find_better_bases(q_ary):
    ratio = {
        method: np.mean(
            [
                lattice.mean_ratio_db(lattice.reduce(q_ary(40, 1009, s), method).basis)
                for s in (1, 2)
            ]
        )
        for method in ("lll", "deep", "bkz", "hkz")
    }
    assert ratio["deep"] < ratio["lll"]
    assert ratio["bkz"] < ratio["lll"]
    assert ratio["hkz"] < ratio["bkz"]


def test_hkz_first_vectors_are_shortest_of_every_projection(q_ary):
    for seed, delta in itertools.product(range(6), (0.5, 0.99)):
        _check_hkz(lattice.reduce(q_ary(16, 101, seed), "hkz", delta).basis)


def _check_hkz(basis: np.ndarray) -> None:
    _, squared = lattice.gram_schmidt(basis)
    L, _ = np.linalg.qr(basis.T.astype(float))
    projected = (L.T @ basis.T).T
    for i in range(len(basis) - 1):
        tail = projected[i:, i:]
        found = lattice.coefficients_in_ball(tail, np.sqrt(squared[i]) * 0.99999)
        assert (found == 0).all()


def test_knapsack_weights_beyond_doubles_range():
    """1400-bit weights: squared norms that only rows with exponents of their own can hold."""
    rng = np.random.default_rng(0)
    n = 12
    rows = np.zeros((n, n + 1), dtype=object)
    for i in range(n):
        rows[i, i] = 1
        rows[i, n] = int.from_bytes(rng.bytes(175), "little")
    result = lattice.reduce(rows)
    assert result.certificate.holds(0.99)
    assert (exact_product(result.transform, rows) == result.basis.astype(object)).all()
    assert is_unimodular(result.transform)


def test_ladder_rises_and_precision_is_given_back():
    from fpylll import FPLLL

    rungs = ladder(200, 64)
    assert rungs[0] == ("d", 0)
    assert rungs[-1][0] == "mpfr"
    assert rungs[-1][1] >= 1.6 * 200
    before = FPLLL.get_precision()
    with mpfr_precision(before + 100):
        assert FPLLL.get_precision() == before + 100
    assert FPLLL.get_precision() == before


def test_a_failed_verification_steps_up_and_in_the_end_raises(monkeypatch, q_ary):
    from cllm.lattice import reduction

    real, seen = reduction._run, []

    def broken(rows, method, delta, block, float_type, deadline):
        seen.append(float_type)
        U, R, done = real(rows, method, delta, block, float_type, deadline)
        if float_type == "d":
            R = R.copy()
            R[0, 0] += 1
        return U, R, done

    monkeypatch.setattr(reduction, "_run", broken)
    result = lattice.reduce(q_ary(8, 101, 0))
    assert result.float_type == "ld"
    assert seen == ["d", "ld"]

    def hopeless(rows, *rest):
        U, R, done = real(rows, *rest)
        return U, R * 2, done

    monkeypatch.setattr(reduction, "_run", hopeless)
    with pytest.raises(ArithmeticError, match=r"\(8, 8\).*differs"):
        lattice.reduce(q_ary(8, 101, 0))


def test_certificate_sees_every_fault(q_ary):
    B = q_ary(10, 101, 2)
    result = lattice.reduce(B)
    good = certify(B, result.transform, result.basis, 0.99)
    assert good.holds(0.99)
    assert not certify(B, result.transform, -result.basis, 0.99).holds(0.99)
    doubled = result.transform.copy()
    doubled[0] *= 2
    assert not certify(B, doubled, doubled @ B, 0.99).unimodular
    unreduced = certify(B, np.eye(10, dtype=np.int64), B, 0.99)
    assert "Lovász" in unreduced.faults(0.99)
    for figures in zip(precise_reducedness(B), reducedness(B), strict=True):
        assert figures[0] == pytest.approx(figures[1])
    skewed = result.basis.copy()
    skewed[9] += 3 * skewed[0]
    assert reducedness(skewed)[0] > 2


def test_modular_determinant_matches_exact(rng):
    for _ in range(20):
        M = rng.integers(-50, 50, (6, 6))
        for prime in PRIMES:
            assert determinant_mod(M, prime) == exact_determinant(M) % prime
    assert determinant_mod(np.zeros((3, 3), dtype=np.int64), PRIMES[0]) == 0


def test_dependent_rows_are_named(q_ary):
    B = q_ary(6, 101, 0)
    assert first_dependent_row(B) is None
    B[4] = B[0] - 3 * B[1]
    for rows in (B, B.astype(float), B * 2.0**-3 + 0.0):
        with pytest.raises(ValueError, match=r"\(6, 6\).*row 4"):
            lattice.reduce(rows)
    with pytest.raises(ValueError, match=r"\(3, 2\).*row 2"):
        lattice.reduce([[1, 2], [3, 4], [5, 7]])


def test_scaling_is_exact_where_it_is_cheap_and_enough_where_it_is_not(rng):
    half = to_integers(np.array([[0.5, 1.25], [3.0, -0.75]]))
    assert half.bits == 2
    assert half.rows.tolist() == [[2, 5], [12, -3]]
    mixed = lattice.reduce([[-1, 2**63], [3, 2]])
    assert abs(exact_determinant(mixed.basis)) == 2 + 3 * 2**63
    assert to_integers(np.array([[3.0, 2.0**80]])).rows.tolist() == [[3, 2**80]]
    B = rng.standard_normal((20, 20)) @ np.diag(np.geomspace(1, 1e-10, 20))
    scaled = to_integers(B)
    # Far fewer than the bits that would represent every entry.
    assert 0 < scaled.bits < 100
    shifted = np.array(scaled.rows, dtype=float) * 2.0**-scaled.bits
    assert (shifted != B).any()
    moved = np.abs(lattice.profile(shifted) - lattice.profile(B)).max()
    assert moved <= 2 * np.sqrt(20) * 2.0**-32 / np.log(2)


@pytest.mark.parametrize("factor", [1e-20, 1e-30, 1e-40])
def test_one_row_of_another_scale_keeps_its_bits(rng, factor):
    """A computed σ_min is right to eps·σ_max only, so it cannot say how many bits such a row needs."""
    B = rng.standard_normal((6, 6))
    B[2] *= factor
    scaled = to_integers(B)
    shifted = np.array([[int(x) / 2**scaled.bits for x in row] for row in scaled.rows])
    assert np.abs(lattice.profile(shifted) - lattice.profile(B)).max() <= 2 * np.sqrt(6) * 2.0**-32
    for method in ("lll", "hkz"):
        assert lattice.reduce(B, method).certificate.holds(0.99)


@pytest.mark.parametrize("method", ["bkz", "hkz"])
@pytest.mark.parametrize("exponent", [300, 1000])
def test_blocks_end_on_rows_of_very_different_lengths(ends, method, exponent):
    code = f"""
        from cllm import lattice
        gap = 2**{2 * exponent}
        rows = [[3 * gap, gap, 0, 0], [gap, 2 * gap, 0, 0], [0, 0, 2, 1], [0, 0, 1, 3]]
        result = lattice.reduce(rows, {method!r})
        assert result.certificate.holds(0.99), result.certificate
        assert sorted(sum(x * x for x in row) for row in result.basis.tolist())[:2] == [5, 5]
    """
    ends(code)


def test_a_measure_that_is_not_a_number_is_a_fault():
    nan = float("nan")
    for max_mu, lovasz in ((nan, 1.0), (0.1, nan)):
        proof = Certificate(product_exact=True, unimodular=True, max_mu=max_mu, lovasz=lovasz)
        assert not proof.holds(0.99)


def test_the_least_int64_is_large():
    least = np.array([[-(2**63)]])
    assert to_float(least, 0)[0, 0] == -(2.0**63)
    assert product_equals(np.array([[-1]]), least, np.array([[2**63]], dtype=object))
    assert not product_equals(np.array([[-1]]), least, least)


@pytest.mark.parametrize("method", ["deep", "bkz", "hkz"])
def test_time_limit_is_reported(q_ary, method):
    B = q_ary(50, 1009, 0)
    result = lattice.reduce(B, method, block_size=30, max_seconds=1e-9)
    assert not result.finished
    assert result.certificate.holds(0.99)
    assert lattice.reduce(q_ary(12, 101, 0), method, max_seconds=600).finished


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "magic"}, "method"),
        ({"delta": 1.0}, "delta"),
        ({"delta": 0.26}, "delta"),
        ({"delta": float("nan")}, "delta"),
        ({"block_size": 1}, "block_size"),
        ({"block_size": 2.5}, "block_size"),
        ({"max_seconds": 0}, "max_seconds"),
        ({"max_seconds": float("nan")}, "max_seconds"),
        ({"max_seconds": 1, "method": "seysen"}, "seysen cannot be stopped"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        lattice.reduce(np.eye(3), **arguments)


def test_hkz_is_refused_beyond_its_dimension():
    with pytest.raises(ValueError, match=r"\(80, 80\).*bkz"):
        lattice.reduce(np.eye(80), "hkz")


def test_seysen_refuses_rows_that_double_cannot_hold_together():
    with pytest.raises(ValueError, match=r"\(2, 2\).*seysen"):
        lattice.reduce([[1, 0], [0, 2**600]], "seysen")


def test_one_row():
    result = lattice.reduce([[3, 4]], "bkz")
    assert result.basis.tolist() == [[3, 4]]
    assert result.transform.tolist() == [[1]]

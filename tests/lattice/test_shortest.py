import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm import lattice


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9))
def test_nothing_is_shorter(seed, n):
    B = np.random.default_rng(seed).integers(-9, 10, (n, n + 1))
    if np.linalg.matrix_rank(B) < n:
        return
    found = lattice.shortest(B)
    assert found.is_exact
    assert (found.coefficients @ B == found.vector).all()
    assert found.norm == pytest.approx(np.linalg.norm(found.vector))
    assert found.norm > 0
    reduced = lattice.reduce(B).basis
    inside = lattice.coefficients_in_ball(reduced, found.norm * (1 - 1e-6))
    assert (inside == 0).all()


@pytest.mark.parametrize(
    "root", [lattice.Zn(6), lattice.Dn(4), lattice.Dn(9), lattice.E8(), lattice.Leech()]
)
def test_minimal_norms_of_root_lattices(root, rng):
    n = root.dimension
    U = np.eye(n, dtype=np.int64) + np.triu(rng.integers(-3, 4, (n, n)), 1)
    found = lattice.shortest(U @ root.integer_generator())
    assert (found.norm * root.unit) ** 2 == pytest.approx(root.minimal_norm)


def test_subset_sum_solution_is_the_shortest_vector(rng):
    """Lagarias & Odlyzko's lattice in the form of Coster et al. 1992, at density below 0.94."""
    n, bits = 20, 60
    weights = np.array([int(x) for x in rng.integers(1, 2**bits, n)], dtype=object)
    chosen = rng.integers(0, 2, n)
    total = sum(int(w) for w, c in zip(weights, chosen, strict=True) if c)
    scale = 2 * n
    B = np.zeros((n + 1, n + 1), dtype=object)
    for i in range(n):
        B[i, i], B[i, n] = 2, scale * int(weights[i])
    B[n, :n], B[n, n] = 1, scale * total
    found = lattice.shortest(B)
    assert found.norm == pytest.approx(np.sqrt(n))
    picked = (found.vector[:n] * (1 if found.coefficients[n] == -1 else -1) + 1) // 2
    assert picked.tolist() == chosen.tolist()


def test_planted_short_vector_in_a_q_ary_lattice(rng):
    n, q = 40, 12289
    secret = rng.integers(-1, 2, n)
    secret[0] = 1
    top = rng.integers(0, q, (19, 20))
    rows = np.vstack([secret, np.hstack([np.zeros((19, 1), np.int64), np.eye(19, dtype=int), top])])
    B = np.vstack([rows, np.hstack([np.zeros((20, 20), np.int64), q * np.eye(20, dtype=int)])])
    U = np.eye(n, dtype=np.int64) + np.tril(rng.integers(-2, 3, (n, n)), -1)
    found = lattice.shortest(U @ B)
    assert np.abs(found.vector).tolist() == np.abs(secret).tolist()
    assert found.ratio < 0.5


def test_random_lattice_is_near_the_gaussian_heuristic(q_ary):
    ratios = [lattice.shortest(q_ary(36, 1009, seed)).ratio for seed in range(4)]
    assert min(ratios) > 0.8
    assert max(ratios) < 1.2


def test_bkz_is_flagged_as_an_approximation(q_ary):
    B = q_ary(80, 1009, 0)
    found = lattice.shortest(B, "bkz", block_size=20)
    assert not found.is_exact
    assert 0.9 < found.ratio < 1.6
    assert found.finished
    assert not lattice.shortest(B, "bkz", block_size=20, max_seconds=1e-9).finished
    assert (found.coefficients @ B == found.vector).all()


def test_float_basis():
    B = np.array([[1.5, 0.0], [0.7, 0.1]])
    found = lattice.shortest(B)
    np.testing.assert_allclose(found.coefficients @ B, found.vector)
    assert found.norm == pytest.approx(np.hypot(1.5 - 1.4, 0.2))


@pytest.mark.parametrize("basis", ["[[2**600, 0], [0, 1]]", "[[1e300, 0.0], [0.0, 1e-300]]"])
def test_rows_of_very_different_lengths_end(ends, basis):
    ends(f"""
        from cllm import lattice
        B = {basis}
        found = lattice.shortest(B)
        assert found.is_exact
        assert found.vector.tolist() in (B[1], [-x for x in B[1]])
    """)


@pytest.mark.parametrize("a", [10**5, 10**17, 10**40])
def test_exact_beyond_double(a):
    """The two rows' lengths agree to all of double's digits."""
    B = [[2 * a, 0], [a + 1, 1726 * a // 1000]]
    found = lattice.shortest(B)
    shortest = min(
        (2 * a * x + (a + 1) * y) ** 2 + (1726 * a // 1000 * y) ** 2
        for x in range(-3, 4)
        for y in range(-3, 4)
        if (x, y) != (0, 0)
    )
    assert found.is_exact
    assert sum(int(x) ** 2 for x in found.vector) == shortest


def test_a_ball_too_full_is_refused_before_it_is_listed():
    with pytest.raises(ValueError, match="more than 1000"):
        lattice.coefficients_in_ball([[1.0]], 1e15, limit=1000)


def test_refusals(q_ary):
    with pytest.raises(ValueError, match=r"\(80, 80\).*bkz"):
        lattice.shortest(q_ary(80, 1009, 0))
    with pytest.raises(ValueError, match="method"):
        lattice.shortest(np.eye(3), "magic")
    with pytest.raises(ValueError, match="exact enumeration cannot be stopped"):
        lattice.shortest(np.eye(3), max_seconds=1)
    with pytest.raises(ValueError, match="row 1"):
        lattice.shortest([[1, 2], [2, 4]])
    with pytest.raises(ValueError, match=r"\(2, 2\).*float64"):
        lattice.shortest([[10**400, 0], [0, 10**400]])

import numpy as np
import pytest

from cllm import lattice
from cllm.lattice.gso import lq


def with_condition(n: int, condition: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.standard_normal((n, n)))[0] for _ in range(2))
    return left @ np.diag(np.geomspace(1, 1 / condition, n)) @ right


def orthogonality(B: np.ndarray, method: str) -> float:
    _, Q = lq(B, method)
    return float(np.linalg.norm(Q @ Q.T - np.eye(len(Q))))


def test_gram_matrix_is_restored(rng):
    B = rng.standard_normal((6, 9))
    mu, squared = lattice.gram_schmidt(B)
    np.testing.assert_allclose(mu @ np.diag(squared) @ mu.T, B @ B.T, atol=1e-12)
    assert (np.diagonal(mu) == 1).all()
    assert (np.triu(mu, 1) == 0).all()


@pytest.mark.parametrize("condition", [1e2, 1e6, 1e9, 1e12])
def test_householder_keeps_orthogonality_where_the_others_lose_it(condition):
    B = with_condition(40, condition)
    householder, modified, classical = (
        orthogonality(B, method) for method in ("householder", "modified", "classical")
    )
    assert householder < 1e-13
    assert householder < modified < classical or condition == 1e2
    assert modified < 1e-14 * condition
    if condition >= 1e9:
        assert classical > 1
        assert modified > 1e3 * householder


def test_methods_agree_on_a_good_basis(rng):
    B = np.eye(8) + 0.1 * rng.standard_normal((8, 8))
    reference = lattice.gram_schmidt(B)
    for method in ("modified", "classical"):
        for got, expected in zip(lattice.gram_schmidt(B, method), reference, strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-12)


def test_rows_of_any_scale():
    B = np.array([[1e-200, 0, 0], [1e-200, 1e200, 0], [3.0, 4.0, 5.0]])
    squared = lattice.gram_schmidt(B[2:])[1]
    assert squared == pytest.approx([50])
    np.testing.assert_allclose(lattice.profile(B), np.log2([1e-200, 1e200, 5.0]), rtol=1e-12)


@pytest.mark.parametrize("method", ["householder", "modified", "classical"])
def test_first_dependent_row_is_named(rng, method):
    B = rng.standard_normal((5, 7))
    B[3] = 2 * B[0] - B[2]
    with pytest.raises(ValueError, match=r"\(5, 7\).*row 3"):
        lattice.gram_schmidt(B, method)
    with pytest.raises(ValueError, match=r"\(4, 3\).*row 3"):
        lattice.gram_schmidt(rng.standard_normal((4, 3)))
    with pytest.raises(ValueError, match="row 1"):
        lattice.gram_schmidt(np.array([[1.0, 2.0], [0.0, 0.0]]))


def test_measures_of_a_diagonal_basis():
    B = np.diag([2.0, 4.0, 8.0])
    np.testing.assert_allclose(lattice.profile(B), [1, 2, 3])
    assert lattice.determinant(B) == pytest.approx(64)
    assert lattice.determinant(B, log=True) == pytest.approx(np.log(64))
    assert lattice.orthogonality_defect(B) == pytest.approx(1)
    assert lattice.root_hermite_factor(B) == pytest.approx(0.5 ** (1 / 3))
    # The ball of volume 64 in three dimensions.
    assert lattice.gaussian_heuristic(B) == pytest.approx((64 * 3 / (4 * np.pi)) ** (1 / 3))
    assert lattice.mean_ratio_db(B) == pytest.approx(10 * np.log10(28 / 16))


def test_measures_know_no_overflow(rng):
    B = rng.standard_normal((200, 200)) * 1e30
    with pytest.raises(ValueError, match=r"\(200, 200\).*log=True"):
        lattice.determinant(B)
    assert np.isfinite(lattice.determinant(B, log=True))
    assert lattice.orthogonality_defect(B, log=True) > 0
    assert np.isfinite(lattice.mean_ratio_db(B * 1e150))


@pytest.mark.parametrize(
    ("function", "B"),
    [
        (lattice.gram_schmidt, np.eye(2) * 1e200),
        (lattice.gram_schmidt, np.eye(2) * 1e-200),
        (lattice.profile, np.full((1, 2), 1.7e308)),
        (lattice.determinant, np.eye(4) * 1e-100),
        # 39 rows of length 1 that stand out of the first by 1e-12 each.
        (lattice.orthogonality_defect, np.eye(40) * 1e-12 + np.eye(1, 40)),
        (lattice.gaussian_heuristic, np.eye(200) * 1.7e308),
        (lattice.dual, np.eye(2) * 1e-310),
    ],
)
def test_what_float64_cannot_hold_is_refused(function, B):
    shape = np.shape(B)
    with pytest.raises(ValueError, match=rf"\({shape[0]}, {shape[1]}\).*float64"):
        function(B)


def test_mean_ratio_is_zero_only_for_a_flat_profile(rng):
    assert lattice.mean_ratio_db(np.linalg.qr(rng.standard_normal((9, 9)))[0]) < 1e-12
    assert lattice.mean_ratio_db(rng.standard_normal((9, 9))) > 0.1


def test_dual_pairs_to_the_identity(rng):
    B = rng.standard_normal((5, 8))
    D = lattice.dual(B)
    np.testing.assert_allclose(B @ D.T, np.eye(5), atol=1e-12)
    np.testing.assert_allclose(lattice.dual(D), B, atol=1e-12)


BAD = [
    (np.zeros((0, 3)), r"\(0, 3\)"),
    (np.zeros(3), r"\(3,\)"),
    (np.zeros((2, 2, 2)), r"\(2, 2, 2\)"),
    (np.array([[1.0, np.nan]]), r"\(1, 2\).*row 0"),
    (np.array([[1.0, 2.0], [np.inf, 0.0]]), r"\(2, 2\).*row 1"),
    (np.array([["a", "b"]]), r"\(1, 2\)"),
    (np.array([[1j, 2]]), r"\(1, 2\)"),
    ([[1, 2], [3]], "different lengths"),
    ([[10**400]], r"\(1, 1\).*beyond float64"),
]


@pytest.mark.parametrize(("B", "message"), BAD)
@pytest.mark.parametrize(
    "function",
    [
        *(lattice.gram_schmidt, lattice.profile, lattice.dual, lattice.determinant),
        *(lattice.orthogonality_defect, lattice.root_hermite_factor, lattice.mean_ratio_db),
        lattice.gaussian_heuristic,
        lambda B: lattice.coefficients_in_ball(B, 1.0),
        lambda B: lattice.closest(B, np.zeros((1, 2))),
    ],
)
def test_bad_input_is_refused_with_its_shape(function, B, message):
    with pytest.raises(ValueError, match=message):
        function(B)


SINGULAR = [([[1.0, 2.0], [2.0, 4.0]], 1), ([[1, 0], [0, 1], [1, 1]], 2), ([[0, 0], [0, 1]], 0)]


@pytest.mark.parametrize(("B", "row"), SINGULAR)
@pytest.mark.parametrize(
    "function",
    [
        *(lattice.gram_schmidt, lattice.profile, lattice.dual, lattice.determinant),
        *(lattice.orthogonality_defect, lattice.root_hermite_factor, lattice.mean_ratio_db),
        *(lattice.gaussian_heuristic, lattice.reduce, lattice.shortest),
        lambda B: lattice.coefficients_in_ball(B, 1.0),
        lambda B: lattice.closest(B, np.zeros((1, 2))),
        lambda B: lattice.closest(B, np.zeros((1, 2)), "exact"),
    ],
)
def test_the_first_dependent_row_is_named_everywhere(function, B, row):
    shape = np.shape(B)
    with pytest.raises(ValueError, match=rf"\({shape[0]}, {shape[1]}\).*row {row} depends"):
        function(B)


@pytest.mark.parametrize(("B", "message"), BAD[:-1])
@pytest.mark.parametrize("function", [lattice.reduce, lattice.shortest])
def test_reduction_refuses_bad_input_with_its_shape(function, B, message):
    with pytest.raises(ValueError, match=message):
        function(B)

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree

from cllm import lattice
from cllm.lattice.closest import METHODS


def basis_and_targets(seed: int, n: int, m: int = 40) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    B = rng.integers(-20, 21, (n, n + 1)).astype(float)
    while np.linalg.matrix_rank(B) < n:
        B = rng.integers(-20, 21, (n, n + 1)).astype(float)
    return B, rng.uniform(-100, 100, (m, n + 1))


def brute_force(B: np.ndarray, T: np.ndarray, low: int, high: int) -> np.ndarray:
    X = np.array(list(itertools.product(range(low, high + 1), repeat=len(B))))
    return np.linalg.norm((X @ B)[None] - T[:, None], axis=2).min(axis=1)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 8))
def test_order_of_the_methods_on_every_target(seed, n):
    B, T = basis_and_targets(seed, n)
    distance = {method: lattice.closest(B, T, method).distances for method in METHODS}
    slack = 1e-9 * (1 + distance["rounding"])
    assert (distance["k-best"] <= distance["nearest-plane"]).all()
    for method in METHODS:
        assert (distance["exact"] <= distance[method] + slack).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40))
def test_nearest_plane_residual_lies_in_the_gram_schmidt_box(seed, n):
    B, T = basis_and_targets(seed, n)
    found = lattice.closest(B, T)
    Q, R = np.linalg.qr(B.T)
    inside = np.abs((T - found.points) @ Q) / np.abs(np.diagonal(R))
    assert inside.max() <= 0.5 + 1e-7


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.sampled_from(METHODS[:3]))
def test_results_are_what_they_say(seed, n, method):
    B, T = basis_and_targets(seed, n)
    found = lattice.closest(B, T, method)
    assert found.coefficients.dtype == np.int64
    np.testing.assert_allclose(found.coefficients @ B, found.points, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(T - found.points, axis=1), found.distances)


def test_one_beam_is_nearest_plane():
    B, T = basis_and_targets(3, 30, 500)
    one, plane = lattice.closest(B, T, "k-best", K=1), lattice.closest(B, T, "nearest-plane")
    assert (one.coefficients == plane.coefficients).all()


def test_more_beams_are_better_and_all_beams_are_exact(q_ary, rng):
    B = lattice.reduce(q_ary(24, 101, 1)).basis
    T = rng.uniform(0, 101, (2000, 24))
    means = [lattice.closest(B, T, "k-best", K=K).distances.mean() for K in (1, 4, 16, 64)]
    assert means == sorted(means, reverse=True)
    assert means[-1] < 0.98 * means[0]
    small, T = B[:6], T[:100]
    beam = lattice.closest(small, T, "k-best", K=729, children=3)
    np.testing.assert_allclose(beam.distances, lattice.closest(small, T, "exact").distances)


@pytest.mark.parametrize("K", [2, 3, 7, 16])
@pytest.mark.parametrize("children", [1, 2, 5])
def test_beams_of_any_number(K, children):
    B, T = basis_and_targets(5, 20, 300)
    for targets in (T, T.astype(np.float32)):
        plane = lattice.closest(B, targets).distances
        beam = lattice.closest(B, targets, "k-best", K=K, children=children).distances
        assert (beam <= plane).all()
        if children > 1:
            assert beam.mean() < plane.mean()


@pytest.mark.parametrize("n", [1, 7, 8, 24, 25, 60, 64, 65, 130])
def test_beams_of_any_dimension_find_what_a_plain_beam_search_finds(n, rng):
    """Rows are decided in blocks, of which the first is not full."""
    B = lattice.reduce(rng.standard_normal((n, n)), "lll").basis
    T = rng.uniform(-9, 9, (5, n)) @ B
    Q, R = np.linalg.qr(B.T)
    for target in T:
        # The whole tree level by level, eight of its vertices kept: rows of (open coordinates, cost).
        beams = [(target @ Q, 0.0)]
        for i in reversed(range(n)):
            offers = []
            for y, cost in beams:
                centre = y[i] / R[i, i]
                near = np.rint(centre)
                for x in (near, near + (1 if centre >= near else -1)):
                    rest = y - x * R[:, i]
                    offers.append((rest, cost + rest[i] ** 2))
            beams = sorted(offers, key=lambda offer: offer[1])[:8]
        distance = lattice.closest(B, target, "k-best", K=8).distances
        best = min(np.sqrt(beams[0][1]), lattice.closest(B, target).distances[0])
        assert distance[0] == pytest.approx(best)


def test_nearest_plane_beats_rounding_in_the_mean(covariance, q_ary, rng):
    for B in (covariance(20, 0), q_ary(20, 101, 0), rng.standard_normal((20, 20))):
        basis = lattice.reduce(B).basis
        T = rng.uniform(-5, 5, (4000, 20)) @ basis
        squares = {m: (lattice.closest(basis, T, m).distances ** 2).mean() for m in METHODS[:2]}
        assert squares["nearest-plane"] < squares["rounding"]
        # What the measures promise: Σ‖b*_i‖²/12 and, for rounding, Σ‖b_i‖²/12.
        _, norms = lattice.gram_schmidt(basis)
        assert squares["nearest-plane"] == pytest.approx(norms.sum() / 12, rel=0.03)
        lengths = (basis.astype(float) ** 2).sum()
        assert squares["rounding"] == pytest.approx(lengths / 12, rel=0.05)


def test_exact_against_brute_force():
    for seed, n in itertools.product(range(8), (1, 2, 3)):
        B, T = basis_and_targets(seed, n, 20)
        B = lattice.reduce(B.astype(np.int64)).basis.astype(float)
        T = T / 10
        expected = brute_force(B, T, -12, 12)
        np.testing.assert_allclose(lattice.closest(B, T, "exact").distances, expected)


def test_exact_against_fplll(q_ary, rng):
    """fplll's own CVP is an upper bound always, and right on nearly all of these."""
    from fpylll import CVP, IntegerMatrix

    B = lattice.reduce(q_ary(16, 101, 3)).basis
    T = rng.integers(0, 101, (40, 16))
    ours = lattice.closest(B, T, "exact").distances
    A = IntegerMatrix.from_matrix(B.tolist())
    theirs = np.array(
        [np.linalg.norm(np.array(CVP.closest_vector(A, t.tolist(), "fast")) - t) for t in T]
    )
    assert (ours <= theirs + 1e-9).all()
    assert np.isclose(ours, theirs).mean() > 0.8


def test_two_exact_searches_agree(q_ary, rng):
    """fplll's enumeration, and our own in step with a box too wide to matter."""
    B = lattice.reduce(q_ary(14, 101, 4)).basis
    T = rng.uniform(0, 101, (100, 14))
    free = lattice.closest(B, T, "exact")
    boxed = lattice.closest(B, T, "exact", bounds=(-1000, 1000))
    np.testing.assert_allclose(free.distances, boxed.distances)


def test_exact_is_equivariant_and_the_basis_does_not_matter(q_ary, rng):
    B = q_ary(12, 101, 2)
    T = rng.uniform(0, 101, (50, 12))
    shift = rng.integers(-3, 4, (50, 12)) @ B
    plain = lattice.closest(B, T, "exact")
    moved = lattice.closest(lattice.reduce(B).basis, T + shift, "exact")
    np.testing.assert_allclose(moved.distances, plain.distances)
    np.testing.assert_allclose(plain.coefficients @ B, plain.points)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.sampled_from(METHODS[:3]))
def test_every_method_is_equivariant_by_lattice_points(seed, n, method):
    B, T = basis_and_targets(seed, n)
    X = np.random.default_rng(seed).integers(-9, 10, (len(T), n))
    plain, moved = (lattice.closest(B, targets, method) for targets in (T, T + X @ B))
    # Rounding may decide a tie, or two beams of nearly one distance, either way.
    np.testing.assert_allclose(moved.points - X @ B, plain.points, atol=1e-6)


def test_planted_point_is_found_and_certified(q_ary, rng):
    B = lattice.reduce(q_ary(40, 1009, 1)).basis
    X = rng.integers(-50, 51, (200, 40))
    half = 0.5 * np.sqrt(lattice.gram_schmidt(B)[1].min())
    noise = rng.standard_normal((200, 40))
    noise *= 0.99 * half / np.linalg.norm(noise, axis=1, keepdims=True)
    for method in METHODS[1:]:
        found = lattice.closest(B, X @ B + noise, method)
        assert (found.coefficients == X).all()
        assert found.is_certified.all()


def test_certified_answers_are_exact_and_not_all_are_certified(q_ary, rng):
    B = lattice.reduce(q_ary(10, 31, 1)).basis
    T = rng.uniform(0, 31, (3000, 10))
    exact = lattice.closest(B, T, "exact")
    assert exact.is_certified.all()
    for method in METHODS[:3]:
        found = lattice.closest(B, T, method)
        certified = found.is_certified
        assert 0 < certified.sum() < len(T)
        np.testing.assert_allclose(found.distances[certified], exact.distances[certified])


@pytest.mark.parametrize("method", METHODS)
def test_certified_in_single_precision_is_closest(method):
    """Coefficients in the millions leave float32 no digits for the distance."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        B = lattice.reduce(rng.standard_normal((2, 2))).basis
        T = (rng.uniform(-4e6, 4e6, (200, 2)) @ B).astype(np.float32)
        found = lattice.closest(B, T, method)
        # The true distances, from coefficients and targets that float64 holds.
        distances = np.linalg.norm(T - found.coefficients.astype(float) @ B, axis=1)
        best = lattice.closest(B, T.astype(float), "exact").distances
        assert (distances <= best + 1e-6)[found.is_certified].all()


def test_single_precision_still_certifies_what_it_can(rng):
    B = lattice.reduce(rng.standard_normal((8, 8))).basis.astype(np.float32)
    X = rng.integers(-20, 21, (100, 8))
    for method in METHODS[1:]:
        found = lattice.closest(B, (X @ B).astype(np.float32), method)
        assert found.is_certified.all()
        assert (found.coefficients == X).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(-3, 0), st.integers(0, 3))
def test_box_bounds(seed, n, low, high):
    B, T = basis_and_targets(seed, n, 20)
    expected = brute_force(B, T, low, high)
    for method in METHODS:
        found = lattice.closest(B, T, method, bounds=(low, high))
        assert found.coefficients.min() >= low
        assert found.coefficients.max() <= high
        assert (found.distances >= expected - 1e-9).all()
        if method == "exact":
            np.testing.assert_allclose(found.distances, expected)


def count_boxed_nodes(L, y, low, high, radius) -> int:
    """All partial coefficient vectors in the box within the radius, level by level."""
    X, count = np.zeros((1, 0)), 0
    values = np.arange(low, high + 1)
    for k in range(len(L) - 1, -1, -1):
        X = np.column_stack([np.tile(values, len(X)), np.repeat(X, len(values), axis=0)])
        X = X[np.linalg.norm(y[k:] - X @ L[k:, k:], axis=1) <= radius]
        count += len(X)
    return count


@pytest.mark.parametrize(("n", "high", "spread"), [(12, 15, 1.0), (14, 3, 1.0), (10, 3, 3.0)])
def test_expected_nodes_of_a_boxed_search_are_near_the_true_number(n, high, spread):
    """Inside the box the heuristic is right; outside, where it is not, probing is."""
    from cllm.lattice.boxed import _probe, expected_boxed_nodes
    from cllm.lattice.gso import lq

    rng = np.random.default_rng(n)
    heuristic, probed, true = [], [], []
    for _ in range(8):
        L, _ = lq(lattice.reduce(rng.standard_normal((n, n))).basis)
        y = (high / 2 * (1 + spread * rng.uniform(-1, 1, (1, n)))) @ L
        low, top = np.zeros(n), np.full(n, float(high))
        start = lattice.closest(L, y, bounds=(0, high)).coefficients.astype(float)
        radius = np.linalg.norm(y - start @ L, axis=1)
        true.append(count_boxed_nodes(L, y[0], 0, high, radius[0]))
        heuristic.append(expected_boxed_nodes(L, y, low, top, start))
        probed.append(_probe(L, y, low, top, radius)[0])
    ratio = np.log2(np.array(probed) / true)
    assert np.abs(ratio).max() < 1
    ratio = np.log2(np.array(heuristic) / true)
    assert ratio.min() > -1
    assert spread > 1 or ratio.max() < 1.5


def test_exact_in_a_box_is_refused_where_it_cannot_end(rng):
    B = lattice.reduce(rng.standard_normal((64, 64))).basis
    T = rng.uniform(-8, 7, (5, 64)) @ B
    with pytest.raises(ValueError, match=r"dimension 64.*about \d\.\de\+\d+ nodes.*k-best"):
        lattice.closest(B, T, "exact", bounds=(-8, 7))
    # The same box around lattice points: there is nothing to search.
    found = lattice.closest(B, np.rint(rng.uniform(-8, 7, (5, 64))) @ B, "exact", bounds=(-8, 7))
    assert (found.distances < 1e-9).all()


def test_exact_in_a_box_is_not_refused_for_targets_outside_it(rng):
    """The ball around such a target is large, but little of it is in the box."""
    from cllm.lattice.boxed import NODE_LIMIT
    from cllm.lattice.enumeration import expected_nodes

    B = lattice.reduce(rng.standard_normal((12, 12))).basis
    T = (1.5 + 4 * rng.uniform(-1, 1, (2, 12))) @ B
    found = lattice.closest(B, T, "exact", bounds=(0, 3))
    start = lattice.closest(B, T, "k-best", bounds=(0, 3)).distances.max()
    logs = lattice.profile(B) * np.log(2)
    assert expected_nodes(logs, start, np.full(12, 4)) > NODE_LIMIT
    X = np.array(list(itertools.product(range(4), repeat=6)))
    tail, head = X @ B[6:], X @ B[:6]
    for target, distance in zip(T, found.distances, strict=True):
        assert distance == pytest.approx(cKDTree(head).query(target - tail)[0].min())


def test_beams_in_a_box_are_worth_it(rng):
    """A four-level grid under a correlated metric, the case of weight rounding."""
    samples = rng.standard_normal((24, 8)) @ rng.standard_normal((8, 400))
    L = np.linalg.cholesky(np.cov(samples) + 0.1 * np.eye(24))
    T = rng.uniform(-0.5, 3.5, (500, 24)) @ L
    squares = [
        (lattice.closest(L, T, method, bounds=(0, 3)).distances ** 2).mean()
        for method in METHODS[:3]
    ]
    assert squares[2] < squares[1] < squares[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kinds_and_dtypes(dtype, rng):
    B = rng.standard_normal((5, 5)) + 4 * np.eye(5)
    T = torch.from_numpy(rng.uniform(-30, 30, (17, 5))).to(dtype)
    for method in METHODS:
        found = lattice.closest(B, T, method)
        assert found.points.dtype == found.distances.dtype == dtype
        assert found.coefficients.dtype == (torch.int32 if dtype == torch.float32 else torch.int64)
        assert found.is_certified.dtype == torch.bool
        as_array = lattice.closest(B, T.numpy(), method)
        assert isinstance(as_array.points, np.ndarray)
        long = lattice.closest(B, T.numpy().astype(np.longdouble), method)
        assert long.points.dtype == np.float64
        assert (as_array.coefficients == found.coefficients.numpy()).all()
    bases = torch.eye(5, dtype=torch.bfloat16), np.eye(5, dtype=np.longdouble)
    assert [lattice.closest(b, T[0]).points.shape for b in bases] == [(1, 5), (1, 5)]
    assert lattice.closest(B, T[0]).points.shape == (1, 5)
    assert lattice.closest(B, T[:0]).points.shape == (0, 5)


def test_chunks_do_not_matter(rng):
    from cllm.lattice.closest import CHUNK

    B = rng.standard_normal((7, 7)) + 3 * np.eye(7)
    T = rng.uniform(-30, 30, (2 * CHUNK + 5, 7))
    for method in METHODS[:3]:
        whole = lattice.closest(B, T, method).coefficients
        pieces = [
            lattice.closest(B, T[i : i + 1000], method).coefficients for i in range(0, len(T), 1000)
        ]
        assert (whole == np.concatenate(pieces)).all()


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (np.zeros((4, 2)), r"\(m, 3\).*\(4, 2\)"),
        (np.zeros((1, 4, 3)), r"\(1, 4, 3\)"),
        (np.array([[0.0, np.nan, 1.0]]), r"\(1, 3\).*NaN"),
        (np.array([[0.0, np.inf, 1.0]]), r"\(1, 3\).*infinity"),
        (np.array([["a", "b", "c"]]), r"\(1, 3\)"),
        ([[1.0, 2.0, 3.0], [1.0]], "different lengths"),
        (1.0, r"\(m, 3\).*\(\)"),
        (np.full((2, 3), 1e300), r"\(2, 3\).*float64"),
        (np.full((2, 3), 1e9, dtype=np.float32), r"\(2, 3\).*float32"),
    ],
)
def test_bad_targets(targets, message):
    with pytest.raises(ValueError, match=message):
        lattice.closest(np.eye(3), targets)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "magic"}, "method"),
        ({"K": 0}, "K must"),
        ({"children": 0}, "children"),
        ({"bounds": (1, 0)}, r"\(3,\).*row 0"),
        ({"bounds": ([0, 0], 1)}, r"\(3,\)"),
        ({"bounds": (0.5, 1)}, "integers"),
        ({"bounds": 3}, "bounds must"),
        ({"bounds": (0, 10**400)}, "bounds must"),
        ({"bounds": (0, np.inf)}, "finite"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        lattice.closest(np.eye(3), np.zeros((1, 3)), **arguments)


def test_exact_is_refused_where_it_cannot_end(rng):
    B = rng.standard_normal((120, 120))
    with pytest.raises(ValueError, match=r"dimension 120.*k-best"):
        lattice.closest(B, rng.standard_normal((1, 120)) * 50, "exact")


def test_singular_basis():
    with pytest.raises(ValueError, match=r"\(2, 2\).*row 1"):
        lattice.closest([[1.0, 2.0], [2.0, 4.0]], np.zeros((1, 2)))

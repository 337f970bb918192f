import numpy as np
import pytest
import torch

from cllm import lattice
from cllm.lattice.golay import golay, hexacode

LATTICES = [lattice.Zn(1), lattice.Zn(5), lattice.Dn(3), lattice.Dn(4), lattice.Dn(7)]
LATTICES += [lattice.E8(), lattice.Leech()]
ids = [root.name for root in LATTICES]

# Normalised second moments as the literature prints them (Conway & Sloane 1999, table 2.3).
MOMENTS = [(lattice.Zn(1), 0.08333), (lattice.Dn(4), 0.07660), (lattice.E8(), 0.07168)]
MOMENTS += [(lattice.Leech(), 0.06577)]


def uniform(root: lattice.RootLattice, count: int, seed: int = 0) -> np.ndarray:
    """Points uniform modulo the lattice."""
    rng = np.random.default_rng(seed)
    return rng.random((count, root.dimension)) @ root.generator()


@pytest.mark.parametrize("root", LATTICES, ids=ids)
def test_generator(root):
    B = root.generator()
    assert abs(np.linalg.det(B)) == pytest.approx(root.volume)
    assert root.contains(B).all()
    assert not root.contains(B * 0.5).all()


@pytest.mark.parametrize("root", LATTICES, ids=ids)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nearest_is_exact(root, dtype):
    count = 3000 if root.dimension == 24 else 1000
    x = (uniform(root, count) * 3).astype(dtype)
    found = root.nearest(x)
    assert found.dtype == dtype
    assert root.contains(found).all()
    exact = lattice.closest(root.generator(), x.astype(np.float64), "exact")
    ours = np.linalg.norm(x.astype(np.float64) - found, axis=1)
    assert np.abs(ours - exact.distances).max() < (1e-5 if dtype == np.float32 else 1e-12)


@pytest.mark.parametrize("root", LATTICES, ids=ids)
def test_lattice_points_and_ties_stay_in_the_lattice(root):
    rng = np.random.default_rng(2)
    points = rng.integers(-4, 5, (500, root.dimension)) @ root.generator()
    np.testing.assert_allclose(root.nearest(points), points, atol=1e-12)
    # Midpoints are as far from two or more points: any of them, but one of them.
    half = points / 2
    assert root.contains(root.nearest(half)).all()
    assert root.contains(root.nearest(half.astype(np.float32))).all()


@pytest.mark.parametrize("root", LATTICES, ids=ids)
def test_equivariant_by_lattice_points(root):
    rng = np.random.default_rng(3)
    x = uniform(root, 500, 4)
    shift = rng.integers(-5, 6, (500, root.dimension)) @ root.generator()
    np.testing.assert_allclose(root.nearest(x + shift), root.nearest(x) + shift, atol=1e-9)


@pytest.mark.parametrize(("root", "moment"), MOMENTS, ids=[r.name for r, _ in MOMENTS])
def test_second_moment(root, moment):
    count = {1: 2_000_000, 4: 400_000, 8: 400_000, 24: 60_000}[root.dimension]
    x = torch.from_numpy(uniform(root, count))
    error = (x - root.nearest(x)).square().mean().item()
    measured = error / root.volume ** (2 / root.dimension)
    assert measured == pytest.approx(moment, rel=0.005)
    assert root.second_moment == pytest.approx(moment, rel=2e-4)


@pytest.mark.parametrize(
    ("root", "kissing"),
    [(lattice.Zn(3), 6), (lattice.Dn(4), 24), (lattice.E8(), 240), (lattice.Leech(), 196560)],
    ids=["Z3", "D4", "E8", "Leech"],
)
def test_kissing_numbers_and_minimal_norms(root, kissing):
    book = root.codebook(np.sqrt(root.minimal_norm))
    zero, least = sorted(book.shells)
    assert zero == 0
    assert least == pytest.approx(root.minimal_norm)
    assert book.shells[least] == kissing == root.kissing_number


def test_theta_series_of_e8():
    """240·σ3(m) vectors of norm 2m."""
    shells = lattice.E8().codebook(np.sqrt(6)).shells
    assert list(shells.values()) == [1, 240, 240 * 9, 240 * 28]


def test_e8_and_leech_are_their_own_duals():
    for root in (lattice.E8(), lattice.Leech()):
        B = root.generator()
        gram = B @ B.T
        np.testing.assert_allclose(gram, np.rint(gram), atol=1e-9)
        assert (np.rint(np.diagonal(gram)) % 2 == 0).all()
        assert root.contains(lattice.dual(B)).all()


def test_golay_code_and_hexacode():
    words = golay()
    assert len(np.unique(words, axis=0)) == 4096
    weights = dict(zip(*np.unique(words.sum(axis=1), return_counts=True), strict=True))
    assert weights == {0: 1, 8: 759, 12: 2576, 16: 759, 24: 1}
    assert not (words @ words.T % 2).any()
    weights = dict(zip(*np.unique((hexacode() != 0).sum(axis=1), return_counts=True), strict=True))
    assert weights == {0: 1, 4: 45, 6: 18}


@pytest.mark.parametrize("root", LATTICES[1:6], ids=ids[1:6])
def test_codebooks(root):
    book = root.codebook(2.0)
    everything = np.arange(len(book))
    points = book.point(everything)
    assert root.contains(points).all()
    assert (book.index(points) == everything).all()
    norms = np.linalg.norm(points, axis=1)
    assert (np.diff(norms) >= -1e-12).all()
    assert norms.max() <= 2 + 1e-9
    # A ball's numbers are those of every larger ball.
    larger = root.codebook(2.5)
    assert (larger.index(points) == everything).all()
    assert (root.index(points, 2.0) == everything).all()
    assert (root.point(everything, 2.0) == points).all()
    shell = book.shell(root.minimal_norm)
    assert len(shell) == root.kissing_number
    assert (shell.index(shell.point(np.arange(len(shell)))) == np.arange(len(shell))).all()


def test_codebook_refusals():
    root = lattice.E8()
    book = root.codebook(1.5)
    with pytest.raises(ValueError, match=r"\(1,\).*\[0, 241\)"):
        book.point([241])
    with pytest.raises(ValueError, match="integers"):
        book.point([0.5])
    with pytest.raises(ValueError, match=r"point 1 of shape \(2, 8\)"):
        book.index(np.array([[0.0] * 8, [1.0] + [0.0] * 7]))
    with pytest.raises(ValueError, match=r"\(3, 7\)"):
        book.index(np.zeros((3, 7)))
    with pytest.raises(ValueError, match="not in the codebook"):
        book.index(np.full((1, 8), 0.1))
    with pytest.raises(ValueError, match="squared norm 3"):
        book.shell(3.0)
    with pytest.raises(ValueError, match="finite"):
        book.index(np.full((1, 8), np.nan))
    with pytest.raises(ValueError, match="more than 1000 points"):
        lattice.coefficients_in_ball(np.eye(6), 5.0, limit=1000)
    with pytest.raises(ValueError, match="radius"):
        lattice.coefficients_in_ball(np.eye(6), np.nan)


@pytest.mark.parametrize("root", LATTICES, ids=ids)
def test_refusals(root):
    n = root.dimension
    for bad, message in (
        (np.zeros((2, n + 1)), rf"\(2, {n + 1}\)"),
        (np.full((1, n), np.nan), rf"\(1, {n}\).*NaN"),
        (np.full((1, n), np.inf), rf"\(1, {n}\)"),
        (np.full((1, n), 1e30), rf"\(1, {n}\).*too large"),
        (np.full((1, n), 1e8, dtype=np.float32), rf"\(1, {n}\).*too large"),
    ):
        with pytest.raises(ValueError, match=message):
            root.nearest(bad)
    with pytest.raises(ValueError, match=rf"\(2, {n + 1}\)"):
        root.contains(np.zeros((2, n + 1)))


def test_kinds():
    root = lattice.E8()
    assert isinstance(root.nearest(torch.zeros(3, 8)), torch.Tensor)
    assert isinstance(root.nearest(np.zeros(8)), np.ndarray)
    assert root.nearest(np.zeros(8)).shape == (8,)
    assert root.nearest(np.zeros((0, 8))).shape == (0, 8)
    assert root.nearest([[0.2] * 8]).shape == (1, 8)
    assert "E8" in repr(root)
    with pytest.raises(ValueError, match="at least 3"):
        lattice.Dn(2)


def test_input_is_left_alone():
    x = torch.rand(100, 24, dtype=torch.float64)
    kept = x.clone()
    lattice.Leech().nearest(x)
    lattice.E8().nearest(x[:, :8])
    lattice.Zn(1).nearest(x[:, :1])
    lattice.Zn(1).nearest(x.view(-1, 1))
    assert torch.equal(x, kept)

from decimal import Decimal, localcontext

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm import lattice
from cllm.lattice.spiral_index import LAYOUTS
from cllm.lattice.ulam import _CHUNK


def walked(count: int) -> np.ndarray:
    """The spiral as one walks it: 1, 1, 2, 2, 3, 3, ... steps, turning left."""
    position, direction, path = np.zeros(2, dtype=int), np.array([1, 0]), [(0, 0)]
    length = 1
    while len(path) < count:
        for _ in range(2):
            for _ in range(length):
                position = position + direction
                path.append(tuple(position))
            direction = np.array([-direction[1], direction[0]])
        length += 1
    return np.array(path[:count])


def test_ulam_is_the_walk():
    count = 5000
    x, y = lattice.ulam(np.arange(1, count + 1))
    assert (np.column_stack([x, y]) == walked(count)).all()
    assert (lattice.ulam_number(x, y) == np.arange(1, count + 1)).all()


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 2**62 - 1))
def test_ulam_inverts_everywhere(n):
    x, y = lattice.ulam(np.array([n]))
    assert lattice.ulam_number(x, y).tolist() == [n]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 2**31 - 1), st.integers(-2, 2))
def test_ulam_around_squares(root, offset):
    """Where a square root in floating point would be off by one."""
    n = min(max(1, root * root + 1 + offset), 2**62 - 2)
    x, y = lattice.ulam(np.array([n, n + 1]))
    assert lattice.ulam_number(x, y).tolist() == [n, n + 1]
    assert abs(x[1] - x[0]) + abs(y[1] - y[0]) == 1


def test_ulam_around_every_square_of_narrow_integers():
    """Below 2^31 single precision finds the corner, and is one off just before many of them."""
    corners = np.arange(3, 46341)[:, None] ** 2 + np.arange(-5, 6)
    x, y = lattice.ulam(corners)
    assert (lattice.ulam_number(x, y) == corners).all()
    assert (np.abs(np.diff(x)) + np.abs(np.diff(y)) == 1).all()
    roots = np.sqrt((corners - 1).astype(np.float32)).astype(np.int64)
    assert (roots**2 > corners - 1).sum() > 1000
    assert lattice.ulam_number(*lattice.ulam([2**31 - 1, 2**31])).tolist() == [2**31 - 1, 2**31]


def test_ulam_chunks_of_narrow_and_wide_numbers_mix():
    n = np.arange(1, 3 * _CHUNK + 1)
    n[_CHUNK + 5] = 2**62 - 1
    assert (lattice.ulam_number(*lattice.ulam(n)) == n).all()
    for bad in (0, -1, -(2**63), 2**62, 2**63 - 1):
        n[2 * _CHUNK + 5] = bad
        with pytest.raises(ValueError, match=r"\[1, 2\^62\)"):
            lattice.ulam(n)


def test_ulam_numbers_of_broadcast_coordinates():
    x, y = np.arange(-200, 201)[:, None], np.arange(-100, 101, dtype=np.int32)
    n = lattice.ulam_number(x, y)
    assert n.shape == (401, 201)
    assert (lattice.ulam(n)[0] == x).all()
    assert (lattice.ulam(n)[1] == y).all()


def test_ulam_shapes_and_chunks():
    n = np.arange(1, 2 * _CHUNK + 8)
    x, y = lattice.ulam(n)
    pieces = [lattice.ulam(n[i : i + 999]) for i in range(0, len(n), 999)]
    assert (np.concatenate([p[0] for p in pieces]) == x).all()
    assert (np.concatenate([p[1] for p in pieces]) == y).all()
    assert lattice.ulam(np.ones((2, 3), dtype=np.int32))[0].shape == (2, 3)
    assert lattice.ulam(np.array([], dtype=int))[0].shape == (0,)
    assert lattice.ulam(9)[0] == 1
    assert n[0] == 1


@pytest.mark.parametrize("order", [1, 2, 3, 6])
def test_hilbert_visits_every_cell_by_neighbours(order):
    n = np.arange(4**order)
    x, y = lattice.hilbert(n, order)
    assert (np.abs(np.diff(x)) + np.abs(np.diff(y)) == 1).all()
    assert len(set(zip(x.tolist(), y.tolist(), strict=True))) == 4**order
    assert (lattice.hilbert_number(x, y, order) == n).all()


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**62 - 1))
def test_morton_and_hilbert_invert_everywhere(n):
    number = np.array([n])
    x, y = lattice.morton(number)
    assert lattice.morton_number(x, y).tolist() == [n]
    assert format(int(x[0]), "b") == (format(n, "b")[::-1][0::2][::-1].lstrip("0") or "0")
    assert lattice.hilbert_number(*lattice.hilbert(number, 31), 31).tolist() == [n]


def test_golden_spiral_is_evenly_spread():
    n = np.arange(2000)
    x, y = lattice.golden(n)
    np.testing.assert_allclose(np.hypot(x, y), np.sqrt(n), atol=1e-9)
    points = np.column_stack([x, y])
    gaps = np.linalg.norm(points[:, None] - points[None], axis=2) + 9 * np.eye(2000)
    assert gaps.min() > 0.9
    assert gaps[:1800].min(axis=1).max() < 2.0


@pytest.mark.parametrize("n", [1, 12345, 2**32 - 1, 10**10, 2**36])
def test_golden_angles_of_large_numbers(n):
    with localcontext() as context:
        context.prec = 60
        turns = Decimal(n) * (3 - Decimal(5).sqrt()) / 2 % 1
    angle = 2 * np.pi * float(turns)
    place = np.sqrt(n) * np.array([np.cos(angle), np.sin(angle)])
    np.testing.assert_allclose(np.array(lattice.golden(n)), place, atol=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_index_finds_what_a_linear_scan_finds(layout, rng):
    index = lattice.SpiralIndex(1000, layout)
    points = rng.uniform(-20, 20, (50, 2))
    points[:10] = index.positions[:10]
    items, distances = index.nearest(points, 7)
    for i, point in enumerate(points):
        away = np.linalg.norm(index.positions - point, axis=1)
        order = np.lexsort((np.arange(1000), away))[:7]
        assert items[i].tolist() == order.tolist()
        np.testing.assert_allclose(distances[i], away[order])
        assert index.within(point, 3.0).tolist() == np.flatnonzero(away <= 3.0).tolist()
    inside = index.box([-2, -2], [3, 1])
    x, y = index.positions[inside].T
    assert ((x >= -2) & (x <= 3) & (y >= -2) & (y <= 1)).all()
    assert (
        len(inside)
        == (
            (np.abs(index.positions[:, 0] - 0.5) <= 2.5)
            & (np.abs(index.positions[:, 1] + 0.5) <= 1.5)
        ).sum()
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_item_has_a_place_of_its_own(layout):
    for count in (1, 2, 5, 300):
        index = lattice.SpiralIndex(count, layout)
        assert len(index) == count == len(np.unique(index.positions, axis=0))
        assert index.nearest(index.positions)[0][:, 0].tolist() == list(range(count))


def test_refusals():
    for bad in (np.array([0]), np.array([2**62]), np.array([1.5]), np.array([2**63], np.uint64)):
        with pytest.raises(ValueError, match=r"\(1,\)"):
            lattice.ulam(bad)
    with pytest.raises(ValueError, match=r"\(1,\)"):
        lattice.ulam_number(np.array([2**31]), np.array([0]))
    with pytest.raises(ValueError, match=r"\(1,\)"):
        lattice.ulam_number(np.array([-(2**63)]), np.array([0]))
    with pytest.raises(ValueError, match=r"\(2,\)"):
        lattice.golden(np.array([1, -1]))
    with pytest.raises(ValueError, match=r"\(1,\)"):
        lattice.morton_number(np.array([2**31]), np.array([0]))
    with pytest.raises(ValueError, match="order"):
        lattice.hilbert(np.array([0]), 32)
    with pytest.raises(ValueError, match=r"\[0, 16\)"):
        lattice.hilbert(np.array([16]), 2)
    index = lattice.SpiralIndex(10)
    with pytest.raises(ValueError, match=r"\(3,\)"):
        index.nearest([1, 2, 3])
    with pytest.raises(ValueError, match="NaN"):
        index.nearest([np.nan, 0])
    with pytest.raises(ValueError, match="more than the 10"):
        index.nearest([0, 0], 11)
    for bad in (-1, np.nan):
        with pytest.raises(ValueError, match="radius"):
            index.within([0, 0], bad)
    with pytest.raises(ValueError, match=r"\(2, 2\)"):
        index.within([[0, 0], [1, 1]], 1)
    with pytest.raises(ValueError, match=r"\(3,\)"):
        index.box([0, 0, 0], [1, 1, 1])
    with pytest.raises(ValueError, match="limit"):
        lattice.SpiralIndex(10**15)
    with pytest.raises(ValueError, match="layout"):
        lattice.SpiralIndex(10, "magic")
    with pytest.raises(ValueError, match="count"):
        lattice.SpiralIndex(0)

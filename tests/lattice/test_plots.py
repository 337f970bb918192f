import itertools

import numpy as np
import pytest

from cllm.lattice import FactorCache, closest, determinant, plots, reduce

pytest.importorskip("matplotlib")

CACHE = FactorCache(1 << 16)


@pytest.mark.parametrize(
    "basis",
    [
        [[1.0, 0.2], [0.55, 0.9]],
        [[1.0, 0.0], [1000.3, 1.0]],
        [[1.0, 0.0], [1e9 + 0.37, 1e-3]],
        [[1.0, 0.0], [0.3, 1e6]],
        [[2**70, 1], [2**71, 5]],
    ],
)
def test_a_skewed_plane_is_drawn_with_few_points(basis):
    figure = plots.plot_plane(np.array(basis, dtype=float))
    (axes,) = figure.axes
    x, y = axes.lines[0].get_xdata(), axes.lines[0].get_ydata()
    low, high = axes.get_xlim()
    assert ((x > low) & (x < high) & (y > low) & (y < high)).sum() > 1
    # The points drawn fill the circle around the square that is shown.
    assert len(x) <= np.pi / 2 * 1.2 * plots.PLANE_POINTS
    assert {text.get_text()[:2] for text in axes.texts} >= {"b1", "b2"}


def test_the_voronoi_cell_is_nearest_to_the_origin(rng):
    for _ in range(20):
        reduced = reduce(rng.standard_normal((2, 2))).basis
        corners = plots._voronoi_cell(reduced)
        found = closest(reduced, 0.999 * corners, "exact")
        assert (found.coefficients == 0).all()
        others = closest(reduced, 1.001 * corners, "exact")
        assert (others.coefficients != 0).any(axis=1).all()
        x, y = corners.T
        area = 0.5 * abs(x @ np.roll(y, 1) - y @ np.roll(x, 1))
        assert area == pytest.approx(determinant(reduced))


@pytest.mark.parametrize("count", [1, 2, 9, 10, 400, 401, 9999])
def test_every_prime_is_on_the_spiral(count):
    figure = plots.plot_ulam(count)
    (axes,) = figure.axes
    grid = axes.images[0].get_array()
    assert grid.shape[0] == grid.shape[1]
    assert grid.shape[0] % 2 == 1
    assert grid.shape[0] - 2 < np.ceil(np.sqrt(count)) + 1
    assert f"{int(grid.sum())} primes up to {count}" in axes.get_title()


@pytest.mark.parametrize(
    ("numbers", "label"),
    [([d for d in range(1, 361) if 360 % d == 0], "{}"), ([2, 3, 5, 7, 6, 30], "a long label {}")],
)
def test_labels_of_a_divisor_lattice_do_not_overlap(numbers, label):
    figure = plots.plot_divisors(CACHE.codes(numbers), [label.format(n) for n in numbers])
    figure.draw_without_rendering()
    boxes = [text.get_bbox_patch().get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == len(numbers)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_refusals():
    with pytest.raises(ValueError, match="2 labels for 1 codes"):
        plots.plot_divisors(CACHE.codes([6]), ["a", "b"])
    with pytest.raises(ValueError, match="got 0"):
        plots.plot_divisors(CACHE.codes([]))
    with pytest.raises(ValueError, match="got 300"):
        plots.plot_divisors(CACHE.codes(np.arange(1, 301)))
    for count in (0, 10**9):
        with pytest.raises(ValueError, match=str(count)):
            plots.plot_ulam(count)
    with pytest.raises(ValueError, match=r"\(3, 3\)"):
        plots.plot_plane(np.eye(3))
    with pytest.raises(ValueError, match=r"\(2, 2\).*row 1"):
        plots.plot_plane([[1, 2], [2, 4]])

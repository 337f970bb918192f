"""Pictures of lattices, as matplotlib figures; nothing is shown or written unless ``save`` is called.

Figures are made without pyplot, which keeps global state.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cllm.lattice.ball import coefficients_in_ball
from cllm.lattice.check import as_real_basis
from cllm.lattice.divisor import Codes
from cllm.lattice.measures import profile
from cllm.lattice.primes import primes_below
from cllm.lattice.reduction import reduce
from cllm.lattice.ulam import ulam

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BLUE, _ORANGE, _GREY = "#2563a8", "#d9730d", "#8a8f98"


def save(figure: Figure, path: str | Path) -> list[Path]:
    """Write PNG and SVG beside each other; the suffix of ``path``, if any, is replaced."""
    base = Path(path).with_suffix("")
    written = [base.with_suffix(suffix) for suffix in (".png", ".svg")]
    for name in written:
        figure.savefig(name, dpi=150)
    return written


def _figure(width: float = 6.4, height: float = 4.8) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def plot_profile(B: Any, methods: tuple[str, ...] = ("lll", "bkz")) -> Figure:
    """log2‖b*_i‖ of the basis as it is and after each reduction."""
    figure, axes = _figure()
    before = profile(B)
    index = np.arange(1, len(before) + 1)
    axes.plot(index, before, color=_GREY, marker=".", label="as given")
    markers = ("o", "s", "^", "v", "D")
    for method, colour, marker in zip(
        methods, (_BLUE, _ORANGE, "#3a8f5c", "#7a4fa3", "#a33b3b"), markers, strict=False
    ):
        after = profile(reduce(B, method).basis)
        axes.plot(
            index, after, color=colour, marker=marker, markersize=3, label=method.upper(), lw=1
        )
    axes.axhline(float(before.mean()), color="black", lw=0.8, ls=":", label="det^(1/n)")
    axes.set(xlabel="index i", ylabel="log2 ‖b*_i‖", title=f"Profile, n = {len(before)}")
    axes.legend(frameon=False)
    return figure


def plot_plane(B: Any) -> Figure:
    """A two-dimensional lattice with the Voronoi cell of the origin, the Gram–Schmidt box that
    Babai's nearest plane rounds to, and the parallelepiped of rounding.

    Raises:
        ValueError: the basis is not 2 × 2 of full rank.
    """
    basis = as_real_basis(B)
    if basis.shape != (2, 2):
        raise ValueError(f"a plane picture needs a (2, 2) basis, got {basis.shape}")
    figure, axes = _figure(6, 6)
    reach = 2.6 * float(np.linalg.norm(basis, axis=1).max())
    points = coefficients_in_ball(reduce(basis).basis, 1.5 * reach) @ reduce(basis).basis
    axes.plot(*points.T, ".", color="black", markersize=4)
    cell = _voronoi_cell(points)
    first = basis[0]
    second = basis[1] - (basis[1] @ first) / (first @ first) * first
    for corners, colour, label in (
        (cell, _BLUE, "Voronoi cell: exact"),
        (_box(first, second), _ORANGE, "Gram–Schmidt box: nearest plane"),
        (_box(basis[0], basis[1]), _GREY, "parallelepiped: rounding"),
    ):
        axes.fill(*corners.T, facecolor=colour, edgecolor=colour, alpha=0.22, label=label)
        axes.plot(*np.vstack([corners, corners[:1]]).T, color=colour, lw=1.2)
    for row, name in zip(basis, ("b1", "b2"), strict=True):
        axes.annotate("", row, (0, 0), arrowprops={"arrowstyle": "->", "lw": 1.4})
        axes.annotate(name, row, xytext=(5, 5), textcoords="offset points")
    axes.set(xlim=(-reach / 2, reach / 2), ylim=(-reach / 2, reach / 2), aspect="equal")
    axes.legend(frameon=True, loc="upper left", fontsize=8)
    axes.set_title("Decision regions of the origin")
    return figure


def _box(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.array([u + v, u - v, -u - v, v - u]) / 2


def _voronoi_cell(points: np.ndarray) -> np.ndarray:
    """Corners, in order, of the Voronoi cell of the origin among the points."""
    from scipy.spatial import Voronoi

    diagram = Voronoi(points)
    origin = int(np.linalg.norm(points, axis=1).argmin())
    corners = diagram.vertices[diagram.regions[diagram.point_region[origin]]]
    return corners[np.argsort(np.arctan2(corners[:, 1], corners[:, 0]))]


def plot_ulam(count: int = 40_000) -> Figure:
    """The numbers 1 … count on Ulam's spiral, primes marked."""
    figure, axes = _figure(6, 6)
    primes = primes_below(count + 1)
    x, y = ulam(primes)
    side = int(np.ceil(np.sqrt(count)))
    grid = np.zeros((side + 2, side + 2))
    middle = side // 2 + 1
    inside = (np.abs(x) < middle) & (np.abs(y) < middle)
    grid[y[inside] + middle, x[inside] + middle] = 1
    extent = (-middle - 0.5, side - middle + 1.5, -middle - 0.5, side - middle + 1.5)
    axes.imshow(grid, origin="lower", cmap="Greys", interpolation="nearest", extent=extent)
    axes.set(title=f"Ulam spiral: {len(primes)} primes up to {count}", xlabel="x", ylabel="y")
    return figure


def plot_divisors(codes: Codes, labels: list[str] | None = None) -> Figure:
    """Hasse diagram of codes under divisibility: a line where one divides another and none of the
    codes lies between; height is the number of prime factors, with multiplicity.

    Args:
        codes: at most some dozens, of a word's pieces for instance.
        labels: one text a code.

    Raises:
        ValueError: labels of another number than codes.
    """
    labels = [str(n) for n in codes.integers()] if labels is None else labels
    if len(labels) != len(codes):
        raise ValueError(f"{len(labels)} labels for {len(codes)} codes")
    numbers = codes.integers()
    levels = np.array([sum(codes[i].values()) for i in range(len(codes))])
    ranks = np.unique(levels, return_inverse=True)[1]
    place = np.zeros((len(codes), 2))
    for rank in range(ranks.max() + 1 if len(codes) else 0):
        members = np.flatnonzero(ranks == rank)
        place[members, 0] = np.arange(len(members)) - (len(members) - 1) / 2
        place[members, 1] = rank
    figure, axes = _figure(7.5, 5.5)
    for low, high in _covers(numbers):
        axes.plot(*place[[low, high]].T, color=_GREY, lw=1, zorder=1)
    for (x, y), label, number in zip(place, labels, numbers, strict=True):
        text = label if label == str(number) else f"{label}\n{number}"
        box = {"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": _BLUE}
        axes.text(x, y, text, ha="center", va="center", fontsize=9, bbox=box, zorder=2)
    axes.set_title("Divisor lattice: a line goes up from a divisor")
    axes.margins(0.18)
    axes.set_axis_off()
    return figure


def _covers(numbers: list[int]) -> list[tuple[int, int]]:
    """Pairs (i, j), i properly dividing j with no other number between."""

    def divides(i: int, j: int) -> bool:
        return numbers[i] != numbers[j] and numbers[j] % numbers[i] == 0

    everyone = range(len(numbers))
    pairs = [(i, j) for i in everyone for j in everyone if divides(i, j)]
    return [(i, j) for i, j in pairs if not any(divides(i, k) and divides(k, j) for k in everyone)]

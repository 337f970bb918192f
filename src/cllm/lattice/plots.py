"""Pictures of lattices, as matplotlib figures; nothing is shown or written unless ``save`` is called.

Figures are made without pyplot, which keeps global state.
"""

from __future__ import annotations

import math
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

# Beyond, a cell is far smaller than a pixel.
ULAM_LIMIT = 4_000_000
HASSE_LIMIT = 200
PLANE_POINTS, LINE_POINTS = 2500, 60

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
    axes.axhline(float(before.mean()), color="black", lw=0.8, ls=":", label=r"$\log_2 \det^{1/n}$")
    axes.set(
        xlabel="index i", ylabel=r"$\log_2 \Vert b^*_i \Vert$", title=f"Profile, n = {len(before)}"
    )
    axes.legend(frameon=False)
    return figure


def plot_plane(B: Any) -> Figure:
    """A two-dimensional lattice with the Voronoi cell of the origin, the Gram–Schmidt box that
    Babai's nearest plane rounds to, and the parallelepiped of rounding.

    What is shown is a neighbourhood of the origin with about ``PLANE_POINTS`` points at most, and
    ``LINE_POINTS`` on a line: of a very skewed basis the vectors leave the picture.

    Raises:
        ValueError: the basis is not 2 × 2 of full rank.
    """
    basis = as_real_basis(B)
    if basis.shape != (2, 2):
        raise ValueError(f"a plane picture needs a (2, 2) basis, got {basis.shape}")
    reduced = as_real_basis(reduce(basis).basis)
    reach = min(1.3 * float(np.linalg.norm(basis, axis=1).max()), _reach(reduced))
    points = coefficients_in_ball(reduced, 1.45 * reach) @ reduced
    figure, axes = _figure(6, 6)
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    axes.plot(*points.T, ".", color="black", markersize=min(4.0, 120 / np.sqrt(len(points))))
    first = basis[0]
    second = basis[1] - (basis[1] @ first) / (first @ first) * first
    for corners, colour, label in (
        (_voronoi_cell(reduced), _BLUE, "Voronoi cell: exact"),
        (_box(first, second), _ORANGE, "Gram–Schmidt box: nearest plane"),
        (_box(basis[0], basis[1]), _GREY, "parallelepiped: rounding"),
    ):
        axes.fill(*corners.T, facecolor=colour, edgecolor=colour, alpha=0.22, label=label)
        axes.plot(*np.vstack([corners, corners[:1]]).T, color=colour, lw=1.2)
    for row, name in zip(basis, ("b1", "b2"), strict=True):
        _arrow(axes, row, name, reach)
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", fontsize=8, ncols=3
    )
    axes.set_title("Decision regions of the origin")
    return figure


def _reach(reduced: np.ndarray) -> float:
    """Half the side r of a square that holds as many points of a reduced basis as we draw: about
    2r/‖b_1‖ on a line, and (2r/‖b_1‖ + 1)(2r/‖b*_2‖ + 1) in all."""
    first, second = (2 / np.exp2(profile(reduced))).tolist()
    half = (first + second) / 2
    root = float(np.sqrt(half * half + first * second * (PLANE_POINTS - 1)))
    return min((PLANE_POINTS - 1) / (root + half), LINE_POINTS / first)


def _arrow(axes: Any, row: np.ndarray, name: str, reach: float) -> None:
    """From the origin to ``row``, or towards it where it lies outside the picture."""
    outside = float(np.abs(row).max()) / (0.88 * reach)
    tip = row / max(1.0, outside)
    axes.annotate("", tip, (0, 0), arrowprops={"arrowstyle": "->", "lw": 1.4})
    text = f"{name}, length {np.linalg.norm(row):.3g}" if outside > 1 else name
    # b1's name below its arrow and b2's above: they may point the same way.
    away = (0, -12) if name == "b1" else (0, 5)
    side = "right" if tip[0] > 0.5 * reach else "left"
    box = {"boxstyle": "square,pad=0.1", "facecolor": "white", "alpha": 0.8, "lw": 0}
    axes.annotate(text, tip, xytext=away, textcoords="offset points", ha=side, bbox=box)


def _box(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.array([u + v, u - v, -u - v, v - u]) / 2


def _voronoi_cell(reduced: np.ndarray) -> np.ndarray:
    """Corners, in order, of the Voronoi cell of the origin: the circumcentres of the six triangles
    around it of an obtuse superbase b_1, b_2, -b_1-b_2 (Conway & Sloane 1999, chapter 21)."""
    u, v = reduced
    v = -v if u @ v > 0 else v
    ring = (u, u + v, v)
    corners = [_circumcentre(a, b) for a, b in zip(ring, (*ring[1:], -u), strict=True)]
    return np.array([*corners, *(-corner for corner in corners)])


def _circumcentre(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of the triangle 0, a, b."""
    weighted = (a @ a) * b - (b @ b) * a
    return np.array([weighted[1], -weighted[0]]) / (2 * (a[0] * b[1] - a[1] * b[0]))


def plot_ulam(count: int = 40_000) -> Figure:
    """The numbers 1 … count on Ulam's spiral, primes marked.

    Raises:
        ValueError: ``count`` below 1, or more numbers than ``ULAM_LIMIT``.
    """
    if not 1 <= count <= ULAM_LIMIT:
        raise ValueError(f"a picture takes from 1 to {ULAM_LIMIT} numbers, got {count}")
    figure, axes = _figure(6, 6)
    primes = primes_below(count + 1)
    x, y = ulam(primes)
    # The ring of the last number: the square up to ring r holds (2r + 1)² numbers.
    ring = (math.isqrt(count - 1) + 1) // 2 if count > 1 else 0
    grid = np.zeros((2 * ring + 1, 2 * ring + 1))
    grid[y + ring, x + ring] = 1
    extent = (-ring - 0.5, ring + 0.5, -ring - 0.5, ring + 0.5)
    axes.imshow(
        grid, origin="lower", cmap="Greys", interpolation="nearest", extent=extent, vmin=0, vmax=1
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    axes.set(title=f"Ulam spiral: {len(primes)} primes up to {count}", xlabel="x", ylabel="y")
    return figure


def plot_divisors(codes: Codes, labels: list[str] | None = None) -> Figure:
    """Hasse diagram of codes under divisibility: a line where one divides another and none of the
    codes lies between; height is the number of prime factors, with multiplicity.

    Args:
        codes: at most ``HASSE_LIMIT``, of a word's pieces for instance.
        labels: one text a code.

    Raises:
        ValueError: labels of another number than codes, or more codes than a picture can hold.
    """
    if not 1 <= len(codes) <= HASSE_LIMIT:
        raise ValueError(f"a picture takes from 1 to {HASSE_LIMIT} codes, got {len(codes)}")
    labels = [str(n) for n in codes.integers()] if labels is None else labels
    if len(labels) != len(codes):
        raise ValueError(f"{len(labels)} labels for {len(codes)} codes")
    numbers = codes.integers()
    texts = [
        label if label == str(number) else f"{label}\n{number}"
        for label, number in zip(labels, numbers, strict=True)
    ]
    place = _ranks(np.array([sum(codes[i].values()) for i in range(len(codes))]))
    # Inches of a box of the longest text at nine points, and of a rank.
    cell = 0.35 + 0.085 * max(len(line) for text in texts for line in text.split("\n"))
    columns, ranks = np.ptp(place, axis=0) + 1
    width, height = max(4.0, cell * columns + 0.4), max(3.0, 0.9 * ranks + 0.6)
    figure, axes = _figure(width, height)
    for low, high in _covers(numbers):
        axes.plot(*place[[low, high]].T, color=_GREY, lw=1, zorder=1)
    for (x, y), text in zip(place, texts, strict=True):
        box = {"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": _BLUE}
        axes.text(x, y, text, ha="center", va="center", fontsize=9, bbox=box, zorder=2)
    axes.set_title("A line goes up from a divisor", fontsize=10)
    middle, half = place[:, 0].mean(), 0.5 * width / cell
    axes.set(xlim=(middle - half, middle + half), ylim=(-0.5, ranks - 0.5))
    axes.set_axis_off()
    return figure


def _ranks(levels: np.ndarray) -> np.ndarray:
    """Places (count, 2): one row a level, its members a unit apart around the middle."""
    ranks = np.unique(levels, return_inverse=True)[1]
    place = np.zeros((len(levels), 2))
    for rank in range(ranks.max() + 1):
        members = np.flatnonzero(ranks == rank)
        place[members, 0] = np.arange(len(members)) - (len(members) - 1) / 2
        place[members, 1] = rank
    return place


def _covers(numbers: list[int]) -> list[tuple[int, int]]:
    """Pairs (i, j), i properly dividing j with no other number between."""

    def divides(i: int, j: int) -> bool:
        return numbers[i] != numbers[j] and numbers[j] % numbers[i] == 0

    everyone = range(len(numbers))
    pairs = [(i, j) for i in everyone for j in everyone if divides(i, j)]
    return [(i, j) for i, j in pairs if not any(divides(i, k) and divides(k, j) for k in everyone)]

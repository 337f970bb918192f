"""The kernel of nearest plane and descent beside torch's passes, and what is shared out among threads."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.bench.lattice_timing import torch_threads
from cllm.compress import scales
from cllm.compress.codecs.quantize import ROWS, nearest_plane
from cllm.compress.decoders import Decoder, Points, babai, descend, k_best, points_of, rtn
from cllm.compress.decoders import columns_kernel as kernel
from cllm.compress.grids import GridSpec, range_grid
from cllm.compress.moments import BLOCK, add_products, mirrored
from cllm.compress.problem import problem
from cllm.compress.scales import PIECE, fit_grid, least_squares_grid

Made = Callable[..., tuple[torch.Tensor, torch.Tensor]]
HERE = kernel.load(torch.float64)
needs_compiler = pytest.mark.skipif(isinstance(HERE, str), reason=str(HERE))
SPEC = GridSpec(bits=2, symmetric=False, group=32)


@needs_compiler
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 70),
    seed=st.integers(0, 1000),
    boxed=st.booleans(),
    sweeps=st.integers(1, 3),
)
@settings(max_examples=30)
def test_kernel_and_passes_decide_alike(made: Made, m, n, seed, boxed, sweeps) -> None:
    W, H = made(m, n, seed)
    p = problem(W, H)
    points = points_of(p, range_grid(W, SPEC, 0.8))
    if not boxed:
        points = Points(points.step, points.offset, -1e6, 1e6)
    assert torch.equal(babai(p, points), babai(p, points, kernel=False))
    single = Points(points.step.float(), points.offset.float(), points.low, points.high)
    assert torch.equal(babai(p, single), babai(p, single, kernel=False))
    start = rtn(p, points)
    found = descend(p, points, start, sweeps)
    assert torch.equal(found, descend(p, points, start, sweeps, kernel=False))
    assert n < 8 or m < 8 or not torch.equal(found, start)


@needs_compiler
def test_in_single_precision_they_are_equally_near(made: Made) -> None:
    W, H = made(50, 300)
    p, grid = problem(W, H, dtype=torch.float32), range_grid(W.float(), SPEC, 0.8)
    points = points_of(p, grid)
    for compiled, passes in (
        (babai(p, points), babai(p, points, kernel=False)),
        (descend(p, points, rtn(p, points)), descend(p, points, rtn(p, points), kernel=False)),
    ):
        assert compiled.dtype == torch.float32
        assert float((compiled != passes).double().mean()) < 1e-3
        near, other = (float(p.objective(grid.values(p.back(c))).sum()) for c in (compiled, passes))
        assert near == pytest.approx(other, rel=1e-3)


def test_without_a_compiler_it_warns_and_decides_alike(made: Made, monkeypatch) -> None:
    W, H = made(5, 20)
    p = problem(W, H)
    points = points_of(p, range_grid(W, SPEC, 0.8))
    wanted = babai(p, points, kernel=False)
    monkeypatch.setattr(kernel, "load", lambda dtype: "there is no C++ compiler g++")
    with pytest.warns(RuntimeWarning, match=r"passes of torch.*no C\+\+ compiler g\+\+"):
        assert torch.equal(babai(p, points), wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        babai(p, points, kernel=False)
        descend(p, points, wanted, kernel=False)


@pytest.mark.parametrize("model", [False, True])
def test_no_bit_depends_on_the_number_of_threads(made: Made, model: bool, monkeypatch) -> None:
    m = 2 * PIECE + 7
    shares, shared = [], scales.for_each
    monkeypatch.setattr(
        scales, "for_each", lambda work, s: (shares.append(list(s)), shared(work, s))
    )
    W, H = made(m, 70)
    outer = made(3, m, seed=1)[1] if model else None
    p = problem(W, H, dtype=torch.float32, outer=outer)
    found = []
    for count in (1, 3):
        with torch_threads(count):
            found.append(fit_grid(p, SPEC, Decoder(K=4, sweeps=1), scales="least-squares"))
    # What is summed together is the same, too: a difference in the last bit would seldom show.
    assert shares[: len(shares) // 2] == shares[len(shares) // 2 :]
    assert max(map(len, shares)) > 1
    (grid, codes), (other, others) = found
    assert torch.equal(codes, others)
    assert torch.equal(grid.scale, other.scale)
    assert grid.offset is not None
    assert other.offset is not None
    assert torch.equal(grid.offset, other.offset)


@needs_compiler
def test_few_rows_are_searched_by_all_threads(made: Made, monkeypatch) -> None:
    from cllm.lattice import beam

    W, H = made(10, 24)
    p = problem(W, H)
    points = points_of(p, range_grid(W, SPEC, 0.8))
    alone = k_best(p, points, 4)
    shares = []
    shared = beam.for_each
    monkeypatch.setattr(beam, "for_each", lambda work, s: (shares.append(list(s)), shared(work, s)))
    with torch_threads(2):
        assert torch.equal(k_best(p, points, 4), alone)
    assert shares == [[0, 5]]


def test_scales_and_offsets_are_solved_for_together(made: Made) -> None:
    W, H = made(6, 70)
    p = problem(W, H)
    grid = range_grid(W, SPEC, 0.7)
    codes = Decoder(method="babai")(p, grid)
    best = least_squares_grid(p, grid, codes)
    value = p.objective(best.values(codes))
    assert best.offset is not None
    assert bool((value < p.objective(grid.values(codes))).all())
    for g in range(SPEC.groups(70)):
        for by in (-0.02, 0.02):
            moved = by * best.scale[:, g]
            scale, offset = best.scale.clone(), best.offset.clone()
            scale[:, g] += moved
            offset[:, g] += moved
            for other in (replace(best, scale=scale), replace(best, offset=offset)):
                assert bool((p.objective(other.values(codes)) > value).all())


def test_products_of_one_triangle_are_those_of_the_whole() -> None:
    rows = torch.from_numpy(np.random.default_rng(0).normal(size=(50, 2 * BLOCK + 9)))
    weights = rows[:, :1].abs()
    plain, heavy = (torch.zeros(rows.shape[1], rows.shape[1], dtype=rows.dtype) for _ in range(2))
    for part, mine in zip(rows.split(20), weights.split(20), strict=True):
        add_products(plain, part)
        add_products(heavy, part, part * mine)
    torch.testing.assert_close(mirrored(plain), rows.T @ rows)
    torch.testing.assert_close(mirrored(heavy), (rows * weights).T @ rows)
    assert torch.equal(mirrored(heavy), mirrored(heavy).T)


def test_a_tables_rows_are_decided_alike_alone_and_among_others() -> None:
    rng = np.random.default_rng(0)
    L, targets = (
        np.triu(rng.normal(size=(9, 9))) + 3 * np.eye(9),
        9 * rng.normal(size=(ROWS + 50, 9)),
    )
    classes = rng.integers(0, 2, targets.shape)

    def bits(kinds: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        return 1 + kinds * sizes.astype(np.float64)

    whole = nearest_plane(L, targets, classes=classes, bits=bits, price=0.3)
    for one in (slice(0, 1), slice(ROWS - 1, ROWS), slice(ROWS, ROWS + 1), slice(ROWS, None)):
        alone = nearest_plane(L, targets[one], classes=classes[one], bits=bits, price=0.3)
        assert np.array_equal(alone, whole[one])
    assert not np.array_equal(whole, nearest_plane(L, targets))

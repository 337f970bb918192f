"""Leech points are exact, by the compiled kernel and by torch's passes."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm import lattice
from cllm.lattice import leech_kernel, native

ROOT = lattice.Leech()
NONE = "there is no C++ compiler g++"
needs_compiler = pytest.mark.skipif(
    shutil.which(native._compiler()) is None, reason="there is no C++ compiler"
)
Nearest = Callable[[np.ndarray], np.ndarray]


def passes(x: np.ndarray) -> np.ndarray:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leech_kernel, "load", lambda dtype: NONE)
        with pytest.warns(RuntimeWarning, match="passes"):
            found = ROOT.nearest(x)
    return np.asarray(found)


def kernel(x: np.ndarray) -> np.ndarray:
    return np.asarray(ROOT.nearest(x))


BOTH = pytest.mark.parametrize("nearest", [pytest.param(kernel, marks=needs_compiler), passes])


def uniform(count: int, seed: int = 0) -> np.ndarray:
    """Points uniform modulo the lattice."""
    return np.random.default_rng(seed).random((count, 24)) @ ROOT.generator() * 3


@BOTH
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nearest_is_exact(nearest: Nearest, dtype: type) -> None:
    x = uniform(1000).astype(dtype)
    found = nearest(x)
    assert found.dtype == dtype
    assert ROOT.contains(found).all()
    exact = lattice.closest(ROOT.generator(), x.astype(np.float64), "exact").distances
    ours = np.linalg.norm(x.astype(np.float64) - found, axis=1)
    assert np.abs(ours - exact).max() < (1e-5 if dtype == np.float32 else 1e-12)


@pytest.mark.slow
@BOTH
def test_many_points(nearest: Nearest) -> None:
    """All kinds of them: uniform, near the lattice, near its deep holes, and on its symmetries."""
    rng = np.random.default_rng(1)
    points = ROOT.codebook(2.0).point(rng.integers(0, 196561, 20000))
    kinds = [
        uniform(20000),
        points + 0.3 * rng.standard_normal(points.shape),
        points / 2 + 0.01 * rng.standard_normal(points.shape),
        points[:, ::-1] / np.sqrt(2) + 1e-3 * rng.standard_normal(points.shape),
    ]
    for x in kinds:
        exact = lattice.closest(ROOT.generator(), x, "exact").distances
        ours = np.linalg.norm(x - nearest(x), axis=1)
        assert np.abs(ours - exact).max() < 1e-12


@needs_compiler
@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(0, 40),
    seed=st.integers(0, 2**20),
    size=st.sampled_from([1e-3, 1.0, 30.0, 1e3, 1e4]),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_kernel_and_passes_find_the_same(count: int, seed: int, size: float, dtype: type) -> None:
    """However many there are beside the lanes of a vector; points of the lattice are their own."""
    rng = np.random.default_rng(seed)
    x = (size * rng.standard_normal((count, 24))).astype(dtype)
    found, others = kernel(x), passes(x)
    # Their sums are rounded in another order, so that of two points nearly as near each may take its own.
    far = [np.linalg.norm(x.astype(np.float64) - points, axis=1) for points in (found, others)]
    assert np.abs(far[0] - far[1]).max(initial=0) < 20 * np.finfo(dtype).eps * max(size, 1)
    assert np.array_equal(kernel(found), found)


@BOTH
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_as_large_as_the_numbers_resolve(nearest: Nearest, dtype: type) -> None:
    reach = ROOT._reach(torch.from_numpy(np.zeros(0, dtype)).dtype) * ROOT.unit
    x = np.random.default_rng(4).uniform(-1, 1, (100, 24)).astype(dtype)
    x *= dtype(0.999 * reach) / np.abs(x).max()
    found = nearest(x).astype(np.float64)
    whole = np.rint(found / ROOT.unit)
    assert np.abs(found / ROOT.unit - whole).max() < 0.1
    assert ROOT._contains(torch.from_numpy(whole).long()).all()
    radius = np.sqrt(2)  # of what a point covers, and of the rounding of x
    far = np.linalg.norm(x.astype(np.float64) - found, axis=1)
    assert far.max() < radius + 24 * np.finfo(dtype).eps * reach


@needs_compiler
def test_equidistant_points_are_as_near_by_both() -> None:
    """Halves of lattice points, deep holes among them: many points are as near."""
    rng = np.random.default_rng(2)
    x = rng.integers(-3, 4, (500, 24)) @ ROOT.generator() / 2
    far = [np.linalg.norm(x - nearest(x), axis=1) for nearest in (kernel, passes)]
    assert np.abs(far[0] - far[1]).max() < 1e-12
    assert ROOT.contains(kernel(x)).all()


@needs_compiler
def test_no_point_depends_on_who_stands_beside_it() -> None:
    x = uniform(1000, seed=3)
    whole = kernel(x)
    for part in (slice(0, 1), slice(5, 22), slice(300, 777)):
        assert np.array_equal(kernel(x[part]), whole[part])
    strided = torch.from_numpy(x)[::3]
    assert np.array_equal(ROOT.nearest(strided).numpy(), whole[::3])


def test_what_is_not_in_the_cpus_memory_is_refused() -> None:
    with pytest.raises(ValueError, match=r"x lies on meta: move it to the CPU"):
        ROOT.nearest(torch.zeros(2, 24, device="meta"))


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leech_kernel, "load", lambda dtype: NONE)
    with pytest.warns(RuntimeWarning, match=r"passes of torch.*no C\+\+ compiler g\+\+"):
        assert (ROOT.nearest(np.zeros((2, 24))) == 0).all()

"""The two ways that beams are searched, kernel and passes, beside each other and beside a plain search."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm import lattice
from cllm.lattice import beam_kernel
from cllm.lattice.beam import Prices, Tree, beam_search

HERE = beam_kernel.load(torch.float64)
needs_compiler = pytest.mark.skipif(isinstance(HERE, str), reason=str(HERE))


def tree(
    seed: int, m: int, n: int, *, boxed: bool, scaled: bool, priced: bool, dtype=torch.float64
) -> Tree:
    rng = np.random.default_rng(seed)

    def real(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape)).to(dtype)

    return Tree(
        opened=3 * real(m, n),
        effects=0.4 * real(n, n),
        squares=real(n).abs() + 0.1,
        low=torch.full((n,), -2, dtype=dtype) if boxed else None,
        high=torch.arange(n).remainder(4).to(dtype) - 2 if boxed else None,
        step=real(m, n).abs() + 0.2 if scaled else None,
        offset=real(m, n) if scaled else None,
        base=real(m, n) if scaled else None,
        prices=Prices(
            torch.from_numpy(rng.integers(0, 5, (m, n)).astype(np.uint8)), real(5, 4).abs()
        )
        if priced
        else None,
    )


def at(values: torch.Tensor | None, t: int, i: int, default: float) -> float:
    return default if values is None else float(values[t, i])


def cost_of(tree: Tree, t: int, x: np.ndarray) -> float:
    """What a path costs in all."""
    line, total = tree.opened[t].double().numpy().copy(), 0.0
    for i in reversed(range(len(line))):
        value = at(tree.offset, t, i, 0) + at(tree.step, t, i, 1) * x[i]
        total += float(tree.squares[i]) * (value - line[i]) ** 2
        if tree.prices is not None:
            costs = tree.prices.costs
            last = costs.shape[1] - 1
            total += float(costs[int(tree.prices.classes[t, i]), min(int(abs(x[i])), last)])
        line[:i] -= (value - at(tree.base, t, i, 0)) * tree.effects[i, :i].double().numpy()
    return total


def plain(tree: Tree, t: int, K: int, children: int, keep_first: bool) -> np.ndarray:
    """One target by lists of (cost, open centres, coefficients), the first beam first."""
    beams = [(0.0, tree.opened[t].double().numpy(), [])]
    for i in reversed(range(tree.opened.shape[1])):
        step, offset = at(tree.step, t, i, 1), at(tree.offset, t, i, 0)
        offers = []
        for number, (cost, line, path) in enumerate(beams):
            centre = (line[i] - offset) / step
            low, high = (
                (-np.inf, np.inf)
                if tree.low is None or tree.high is None
                else (float(tree.low[i]), float(tree.high[i]))
            )
            near = min(max(np.rint(centre), low), high)
            side = 1 if centre >= near else -1
            if not low <= near + side <= high:
                side = -side
            mine = []
            for c in range(children):
                x = near + side * ((c + 1) // 2 if c % 2 else -(c // 2))
                if not low <= x <= high:
                    continue
                more = float(tree.squares[i]) * step**2 * (x - centre) ** 2
                if tree.prices is not None:
                    costs = tree.prices.costs
                    more += float(
                        costs[int(tree.prices.classes[t, i]), int(min(abs(x), costs.shape[1] - 1))]
                    )
                rest = line - (offset + step * x - at(tree.base, t, i, 0)) * tree.effects[i].numpy()
                mine.append((cost + more, rest, [x, *path]))
            if number == 0 and keep_first:
                mine.sort(key=lambda offer: offer[0])
                kept = mine.pop(0)
            offers += mine
        offers.sort(key=lambda offer: offer[0])
        beams = ([kept] if keep_first else []) + offers
        beams = beams[:K]
    return np.array(min(beams, key=lambda beam: beam[0])[2])


@pytest.mark.parametrize("kernel", [pytest.param(True, marks=needs_compiler), False])
@given(
    seed=st.integers(0, 10_000),
    n=st.one_of(st.integers(1, 30), st.sampled_from([63, 64, 65, 130])),
    K=st.sampled_from([1, 2, 3, 5, 16, 40]),
    children=st.integers(1, 4),
    boxed=st.booleans(),
    scaled=st.booleans(),
    priced=st.booleans(),
    keep_first=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_it_finds_what_a_plain_search_finds(
    kernel, seed, n, K, children, boxed, scaled, priced, keep_first
):
    # Effects as large as here make centres grow with the rows; few rows and beams are many cases.
    made = tree(seed, 2, n, boxed=boxed, scaled=scaled, priced=priced)
    made = Tree(**{**made.__dict__, "effects": made.effects / n**0.5})
    found = beam_search(made, K, children, keep_first=keep_first, kernel=kernel)
    for t in range(2):
        ours = cost_of(made, t, found[t].numpy())
        theirs = cost_of(made, t, plain(made, t, K, children, keep_first))
        assert ours == pytest.approx(theirs, rel=1e-9)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernel_and_passes_agree_in_both_precisions(dtype):
    made = tree(0, 700, 90, boxed=True, scaled=True, priced=True, dtype=dtype)
    made = Tree(**{**made.__dict__, "effects": made.effects / 10})
    kernel, passes = (beam_search(made, 16, keep_first=True, kernel=k) for k in (True, False))
    same = (kernel == passes).all(dim=1)
    # Sums are rounded differently; in single precision that decides a near tie now and then.
    assert float(same.double().mean()) > (0.9 if dtype == torch.float32 else 0.999)
    assert not bool(torch.equal(kernel, beam_search(made, 1, keep_first=True)))


def test_chunks_and_threads_do_not_matter():
    made = tree(1, 600, 20, boxed=False, scaled=True, priced=False)
    whole, before = beam_search(made, 4), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(beam_search(made, 4), whole)
    finally:
        torch.set_num_threads(before)


@needs_compiler
def test_numbers_that_overflow_do_no_harm():
    """Costs become infinite and then no numbers; the kernel must not look where there is nothing."""
    for priced in (False, True):
        made = tree(2, 3, 70, boxed=False, scaled=False, priced=priced, dtype=torch.float32)
        wild = Tree(**{**made.__dict__, "effects": made.effects * 1e30})
        for K in (2, 16, 50):
            assert beam_search(wild, K, kernel=True).shape == (3, 70)


def test_without_a_compiler_it_warns_and_goes_on_and_insisting_is_refused(monkeypatch):
    monkeypatch.setattr(beam_kernel, "load", lambda dtype: "there is no C++ compiler g++")
    B, T = np.eye(3), np.random.default_rng(0).uniform(-9, 9, (8, 3))
    with pytest.warns(RuntimeWarning, match=r"passes of torch.*no C\+\+ compiler g\+\+"):
        found = lattice.closest(B, T, "k-best", K=2)
    assert (found.coefficients == np.rint(T)).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lattice.closest(B, T, "k-best", K=2, kernel=False)
    with pytest.raises(ValueError, match=r"cannot be compiled: there is no C\+\+ compiler"):
        lattice.closest(B, T, "k-best", K=2, kernel=True)

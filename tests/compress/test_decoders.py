"""Decoders onto fixed grids: what equals what, what is never worse, and every shape and metric."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.compress.decoders import METHODS, Decoder, descend, k_best, points_of
from cllm.compress.grids import GridSpec, as_stored, grid_spec, range_grid
from cllm.compress.problem import ORDERS, decision_order, objective, problem
from cllm.compress.scales import fit_grid, least_squares_grid
from cllm.lattice import closest

Made = Callable[..., tuple[torch.Tensor, torch.Tensor]]
SPECS = [
    GridSpec(bits=2, symmetric=False, group=0),
    GridSpec(bits=3, symmetric=True, group=32),
    GridSpec(bits=4, symmetric=False, group=64),
    GridSpec(bits=8, symmetric=True, group=128),
]
BLOCKED = [grid_spec(4, grid="gguf-q4_0"), grid_spec(8, grid="gguf-q8_0")]


def gptq(
    W: torch.Tensor, H: torch.Tensor, scale, offset, low: int, high: int, order
) -> torch.Tensor:
    """The textbook algorithm (Frantar et al. 2022, algorithm 1): the inverse's Cholesky factor, one
    column at a time, each error handed on to the columns that are left. ``order``: first decided first."""
    W, n = W[:, order].clone(), len(H)
    inverse = torch.linalg.inv(H[order][:, order])
    factor = torch.linalg.cholesky(inverse, upper=True)
    codes = torch.zeros_like(W)
    for j in range(n):
        s, o = scale[:, order[j]], offset[:, order[j]]
        codes[:, j] = torch.clamp(torch.round((W[:, j] - o) / s), low, high)
        error = (W[:, j] - (o + s * codes[:, j])) / factor[j, j]
        W[:, j:] -= torch.outer(error, factor[j, j:])
    out = torch.empty_like(codes)
    out[:, order] = codes
    return out.long()


@pytest.mark.parametrize("order", ["natural", "act", "min-pivot"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.bits}-{s.group}")
def test_one_beam_is_babai_is_textbook_gptq_integer_for_integer(
    made: Made, spec: GridSpec, order: str
) -> None:
    W, H = made(16, 96)
    p = problem(W, H, damping=0.01, order=order)
    grid = range_grid(W, spec, 0.8)
    babai = Decoder(method="babai")(p, grid)
    one = p.back(k_best(p, points_of(p, grid), 1)).long()
    textbook = gptq(W, p.H, grid.steps(), grid.offsets(), spec.low, spec.high, p.order.flip(0))
    assert torch.equal(one, babai)
    assert torch.equal(textbook, babai)
    # It is not the same for the trivial reason that the metric does not matter.
    assert not torch.equal(Decoder(method="rtn")(p, grid), babai)


@pytest.mark.parametrize("bits", [2, 3])
def test_the_beam_is_the_lattice_floors_where_all_columns_share_a_scale(
    made: Made, bits: int
) -> None:
    """``cllm.lattice`` decodes the same problem with one basis for all rows."""
    W, H = made(30, 32)
    spec = GridSpec(bits=bits, symmetric=True, group=0)
    p, grid = problem(W, H), range_grid(W, spec, 0.8)
    R = p.U * p.squares.sqrt()[:, None]
    targets = (p.weight / grid.scale[:, :1]) @ R.T
    found = closest(R.T.numpy(), targets.numpy(), "nearest-plane", bounds=(spec.low, spec.high))
    assert np.array_equal(
        p.back(torch.as_tensor(found.coefficients)).numpy(),
        Decoder(method="babai")(p, grid).numpy(),
    )
    theirs = closest(R.T.numpy(), targets.numpy(), "k-best", K=8, bounds=(spec.low, spec.high))
    ours = p.objective(grid.values(Decoder(K=8)(p, grid)))
    other = torch.as_tensor(theirs.distances) ** 2 * grid.scale[:, 0] ** 2
    assert float(ours.sum()) <= 1.02 * float(other.sum())


def test_more_beams_reach_the_exhaustive_optimum_on_tiny_matrices(made: Made) -> None:
    W, H = made(6, 5, seed=3)
    spec = GridSpec(bits=2, symmetric=False, group=0)
    p, grid = problem(W, H), range_grid(W, spec, 0.7)
    every = torch.tensor(list(itertools.product(range(-2, 2), repeat=5)))
    best = torch.full((6,), torch.inf, dtype=torch.float64)
    for codes in every:
        best = torch.minimum(best, p.objective(grid.values(codes.expand(6, 5))))
    found = p.objective(grid.values(k_codes(p, grid, 256)))
    torch.testing.assert_close(found, best)
    assert (
        float(p.objective(grid.values(Decoder(method="babai")(p, grid))).sum()) > best.sum() * 1.001
    )


def k_codes(p, grid, K: int) -> torch.Tensor:
    """K-best's codes with all four children of two bits."""
    return p.back(k_best(p, points_of(p, grid), K, children=7)).long()


@pytest.mark.parametrize("method", METHODS)
@given(
    m=st.integers(1, 6),
    n=st.integers(1, 70),
    seed=st.integers(0, 1000),
    spec=st.sampled_from(SPECS),
    order=st.sampled_from(ORDERS),
    kind=st.sampled_from(
        [
            "usual",
            "zero rows",
            "constant rows",
            "dead inputs",
            "rank deficient",
            "huge condition",
            "zero metric",
        ]
    ),
)
@settings(max_examples=15)
def test_every_shape_and_metric_is_decoded_inside_the_grid(
    made: Made, method, m, n, seed, spec, order, kind
):
    if method.startswith("k-best-"):
        pytest.importorskip("fpylll")
    W, H = made(m, n, seed, kind)
    p = problem(W, H, order=order)
    grid, codes = fit_grid(p, spec, Decoder(method=method, K=4), scales="search")
    assert codes.shape == (m, n)
    assert int(codes.min()) >= spec.low
    assert int(codes.max()) <= spec.high
    values = grid.values(codes)
    assert bool(torch.isfinite(values).all())
    if kind == "zero rows":
        assert not values[::2].any()
    elif kind == "constant rows":
        # A constant is an offset, or the farthest code.
        torch.testing.assert_close(values.double(), W, rtol=2e-2, atol=1e-6)


@given(
    m=st.integers(1, 5),
    n=st.integers(1, 60),
    seed=st.integers(0, 1000),
    spec=st.sampled_from(SPECS[:3]),
    K=st.integers(2, 9),
)
@settings(max_examples=30)
def test_no_row_is_ever_worse_than_babais(made: Made, m, n, seed, spec, K):
    W, H = made(m, n, seed)
    p, grid = problem(W, H), range_grid(W, spec, 0.75)

    def error(codes: torch.Tensor) -> torch.Tensor:
        return p.objective(grid.offsets() + grid.steps() * codes)

    limit = error(Decoder(method="babai")(p, grid)) * (1 + 1e-9) + 1e-12
    for decoder in (Decoder(K=K), Decoder(K=K, sweeps=2), Decoder(method="klein", K=K)):
        assert bool((error(decoder(p, grid)) <= limit).all())


@given(seed=st.integers(0, 1000), sweeps=st.integers(1, 3))
@settings(max_examples=20)
def test_descent_only_ever_gains_and_ends_where_no_single_code_can_move(made: Made, seed, sweeps):
    W, H = made(4, 20, seed)
    spec = GridSpec(bits=2, symmetric=False, group=0)
    p, grid = problem(W, H), range_grid(W, spec)
    points = points_of(p, grid)
    rtn = Decoder(method="rtn").decide(p, points)
    before = p.objective(grid.values(p.back(rtn)))
    after = p.objective(grid.values(p.back(descend(p, points, rtn, sweeps))))
    assert bool((after <= before * (1 + 1e-6)).all())
    still = p.back(descend(p, points, rtn, 50)).long()
    value = p.objective(grid.values(still))
    for j in range(20):
        for code in range(-2, 2):
            moved = still.clone()
            moved[:, j] = code
            assert bool((p.objective(grid.values(moved)) >= value * (1 - 1e-6)).all())


@pytest.mark.parametrize("method", ["lll", "bkz"])
def test_a_reduced_basis_helps_where_nothing_clips_and_never_harms(method: str) -> None:
    pytest.importorskip("fpylll")
    rng = np.random.default_rng(0)
    X = rng.normal(size=(300, 24)) @ (np.eye(24) + rng.normal(size=(24, 24)))
    W, H = torch.from_numpy(rng.normal(size=(40, 24))), torch.from_numpy(X.T @ X)
    spec = GridSpec(bits=8, symmetric=True, group=0)
    p, grid = problem(W, H, damping=1e-4), range_grid(W, spec)
    plain = p.objective(grid.values(Decoder(K=2)(p, grid)))
    reduced = p.objective(grid.values(Decoder(method=f"k-best-{method}", K=2)(p, grid)))
    assert bool((reduced <= plain * (1 + 1e-9)).all())
    assert float(reduced.sum()) < 0.98 * float(plain.sum())


@pytest.mark.parametrize("spec", SPECS[:3] + BLOCKED, ids=lambda s: f"{s.bits}{s.block}-{s.group}")
def test_scales_in_the_loop_come_nearer_than_searched_ones_and_those_than_ranges(
    made: Made, spec
) -> None:
    W, H = made(10, 96)
    p, decoder = problem(W, H), Decoder(K=4)
    errors = []
    for scales in ("range", "search", "least-squares"):
        grid, codes = fit_grid(p, spec, decoder, scales=scales)
        # What is judged is what a file holds.
        assert torch.equal(as_stored(grid.scale), grid.scale)
        errors.append(float(p.objective(grid.values(codes)).sum()))
    assert errors[2] <= errors[1] <= errors[0] * (1 + 1e-9)
    if spec.bits < 4:
        assert errors[2] < 0.97 * errors[1]


def test_least_squares_scales_are_the_best_for_their_codes(made: Made) -> None:
    W, H = made(5, 64)
    p = problem(W, H)
    for spec in (GridSpec(bits=2, symmetric=False, group=32), GridSpec(bits=3, group=32)):
        grid = range_grid(W, spec, 0.8)
        codes = Decoder(method="babai")(p, grid)
        best = least_squares_grid(p, grid, codes)
        value = p.objective(best.values(codes))
        for factor in (0.99, 1.01):
            for g in range(2):
                scale = best.scale.clone()
                scale[:, g] *= factor
                assert bool((p.objective(replace(best, scale=scale).values(codes)) > value).all())


def test_min_pivot_order_takes_the_least_pivot_of_what_is_left(made: Made) -> None:
    _, H = made(2, 12)
    places = decision_order(H, "min-pivot").tolist()
    assert sorted(places) == list(range(12))
    left = H.clone()
    for k, j in enumerate(places):
        assert float(left[j, j]) == pytest.approx(min(float(left[i, i]) for i in places[k:]))
        left = left - torch.outer(left[:, j], left[j]) / left[j, j]
    assert decision_order(H, "natural").tolist() == list(range(11, -1, -1))


def test_dead_inputs_are_rounded_to_the_nearest_and_change_nothing_else(made: Made) -> None:
    W, H = made(6, 20)
    dead = H.clone()
    dead[3, :] = dead[:, 3] = 0
    p = problem(W, dead)
    grid = range_grid(W, SPECS[2])
    codes = Decoder(method="babai")(p, grid)
    nearest = Decoder(method="rtn")(p, grid)
    assert torch.equal(codes[:, 3], nearest[:, 3])
    kept = [j for j in range(20) if j != 3]
    alone = problem(W[:, kept], H[kept][:, kept])
    same = Decoder(method="babai")(alone, replace(grid, columns=19))
    assert torch.equal(codes[:, kept], same)


def test_what_is_no_problem_is_refused_by_its_shape(made: Made) -> None:
    W, H = made(3, 4)
    bad = H.clone()
    bad[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"metric of shape \(4, 4\) holds NaN"):
        problem(W, bad)
    with pytest.raises(ValueError, match=r"weights of shape \(3, 4\) hold NaN"):
        problem(W * torch.nan, H)
    with pytest.raises(ValueError, match="not symmetric"):
        problem(W, torch.triu(H))
    with pytest.raises(ValueError, match=r"\(3, 3\) do not fit"):
        problem(W[:, :3], H)
    with pytest.raises(ValueError, match="order must be one of"):
        problem(W, H, order="random")
    with pytest.raises(ValueError, match="2, 3, 4 or 8 bits"):
        grid_spec(5)
    with pytest.raises(ValueError, match="the grid must be"):
        grid_spec(4, grid="gguf-q3_k")
    with pytest.raises(ValueError, match="32 columns at a time"):
        range_grid(W, BLOCKED[0])
    with pytest.raises(ValueError, match="method must be one of"):
        Decoder(method="magic")


def test_objective_is_the_squared_error_of_what_the_layer_makes() -> None:
    rng = np.random.default_rng(0)
    X, W, V = (torch.from_numpy(rng.normal(size=s)) for s in ((50, 7), (3, 7), (3, 7)))
    direct = ((X @ (W - V).T) ** 2).sum(dim=0)
    torch.testing.assert_close(objective(W, V, X.T @ X), direct)

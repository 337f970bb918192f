"""Pruning: SparseGPT by the textbook, the patterns, and sparse storage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cllm
from cllm.compress.command import compress_run
from cllm.compress.formats import CASTS, read_packed, read_state
from cllm.compress.grids import GridSpec, range_grid
from cllm.compress.problem import problem
from cllm.compress.pruning import Pattern, parse_pattern, prune_on_grid, prune_values, sparse_gpt
from cllm.compress.settings import Settings
from cllm.compress.sparse import part_names, read_sparse, store_sparse, store_sparse_grid
from cllm.core.errors import UsageError
from cllm.store.container import Container
from cllm.text.dataset import load_prepared
from cllm.training.progress import Silent


def made(m: int = 12, n: int = 40, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (m, n) and a metric (n, n) of correlated inputs."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(4 * n, n)) @ (np.eye(n) + rng.normal(size=(n, n)) * 0.3)
    return torch.from_numpy(rng.normal(size=(m, n)) * 0.1), torch.from_numpy(X.T @ X)


def textbook(W: torch.Tensor, H: torch.Tensor, share: float, size: int, neighbours: bool):
    """Algorithm 1 of the paper: the inverse's Cholesky factor, masks for blocks of columns, each error
    handed on to the columns that are left."""
    W, n = W.clone(), len(H)
    factor = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    kept = torch.ones_like(W, dtype=torch.bool)
    for j in range(n):
        if j % size == 0:
            block = slice(j, min(j + size, n))
            costs = W[:, block] ** 2 / torch.diagonal(factor)[block] ** 2
            if neighbours:
                worst = costs.argsort(dim=1)[:, : round(share * size)]
                kept[:, block] = kept[:, block].scatter(1, worst, False)
            else:
                flat = costs.flatten().argsort()[: round(share * costs.numel())]
                part = torch.ones(costs.numel(), dtype=torch.bool)
                part[flat] = False
                kept[:, block] = part.view(costs.shape)
        new = torch.where(kept[:, j], W[:, j], 0.0)
        error = (W[:, j] - new) / factor[j, j]
        W[:, j:] -= torch.outer(error, factor[j, j:])
        W[:, j] = new
    return kept, torch.where(kept, W, 0.0)


@pytest.mark.parametrize("text", ["50%", "30%", "2:4"])
def test_it_is_the_textbook_algorithm(text: str) -> None:
    W, H = made(10, 160)
    pattern = parse_pattern(text)
    p = problem(W, H, order="natural")
    kept, values = prune_values(p, pattern)
    mask, wanted = textbook(W, p.H, pattern.share, pattern.of or 128, bool(pattern.of))
    assert torch.equal(kept, mask)
    torch.testing.assert_close(values, wanted, rtol=1e-6, atol=1e-9)
    # Errors are made up for: the same mask without that costs more.
    plain = p.objective(torch.where(kept, W, 0.0))
    assert float(p.objective(values).sum()) < 0.8 * float(plain.sum())


@given(m=st.integers(1, 9), n=st.integers(1, 70), share=st.floats(0.05, 0.95))
def test_the_share_is_kept_in_every_block(m: int, n: int, share: float) -> None:
    W, H = made(m, n)
    kept, values = prune_values(problem(W, H), Pattern(share=share))
    # As floats go, (share · m) · n is another number.
    assert int((~kept).sum()) == round(share * (m * n))
    assert not values[~kept].any()


def test_two_of_four_neighbours_go_in_the_rows_own_order() -> None:
    W, H = made(8, 32)
    p = problem(W, H, order="natural")
    kept, _ = prune_values(p, parse_pattern("2:4"))
    assert (kept.view(8, 8, 4).sum(dim=2) == 2).all()
    with pytest.raises(ValueError, match="does not divide 30 columns"):
        sparse_gpt(problem(W[:, :30], H[:30, :30]), parse_pattern("2:4"))


def test_on_a_grid_pruning_and_rounding_make_up_for_each_other() -> None:
    W, H = made(16, 64)
    p, spec = problem(W, H), GridSpec(bits=4, symmetric=True, group=32)
    kept, grid, codes = prune_on_grid(p, parse_pattern("50%"), spec)
    assert int(codes.min()) >= spec.low
    assert int(codes.max()) <= spec.high
    together = p.objective(torch.where(kept, grid.values(codes), 0.0)).sum()
    alone, values = prune_values(p, parse_pattern("50%"))
    rounded = ((values / grid.steps()).round().clamp(spec.low, spec.high)) * grid.steps()
    assert float(together) < float(p.objective(torch.where(alone, rounded, 0.0)).sum())


@given(
    m=st.integers(1, 6),
    n=st.integers(1, 300),
    share=st.sampled_from([0.0, 0.05, 0.5, 0.97, 1.0]),
    seed=st.integers(0, 99),
)
def test_sparse_storage_is_a_round_trip(m: int, n: int, share: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    kept = torch.from_numpy(rng.random((m, n)) < share)
    values = torch.from_numpy(rng.normal(size=(m, n))).half().float()
    stored, parts = store_sparse(kept, values, CASTS["fp16"], "fp16")
    assert sorted(parts) == sorted(part_names(stored))
    assert torch.equal(read_sparse(stored, parts), torch.where(kept, values, 0.0))
    for symmetric in (True, False):
        grid = range_grid(values, GridSpec(bits=3, symmetric=symmetric, group=32))
        codes = torch.from_numpy(rng.integers(-4, 4, size=(m, n)))
        stored, parts = store_sparse_grid(kept, grid, codes)
        assert sorted(parts) == sorted(part_names(stored))
        wanted = torch.where(kept, grid.values(codes), 0.0)
        assert torch.equal(read_sparse(stored, parts), wanted)


def test_sparse_parts_that_contradict_each_other_are_refused() -> None:
    kept = torch.ones(2, 5, dtype=torch.bool)
    stored, parts = store_sparse(kept, torch.ones(2, 5), CASTS["fp16"], "fp16")
    with pytest.raises(ValueError, match="out of order"):
        read_sparse(stored, parts | {"rows": torch.tensor([0, 7, 5], dtype=torch.int32)})
    with pytest.raises(ValueError, match="beyond its columns"):
        read_sparse(stored, parts | {"gaps": parts["gaps"] + 17})
    with pytest.raises(ValueError, match="do not hold"):
        read_sparse(stored, parts | {"gaps": parts["gaps"][:1]})


@pytest.mark.parametrize(
    ("changes", "bits"),
    [
        ({"method": "fp16", "prune": "50%"}, 10),
        ({"method": "bf16", "prune": "2:4"}, 10),
        ({"method": "babai", "bits": 4, "prune": "0.5"}, 4),
        ({"method": "int8"}, 8),
    ],
    ids=str,
)
def test_pruned_and_int8_models_read_back_what_was_scored(
    changes: dict[str, Any], bits: float, trained: Path, isolated: Path
) -> None:
    settings = Settings(**({"tokens": 256, "table": "fp16"} | changes))
    made = compress_run(trained, settings, Silent(), out=isolated / "a.cllm")
    tokens = load_prepared(cllm.load(trained).directory.data).validation
    again = cllm.load(made.path)._score(tokens, Silent()).bpb
    assert again == pytest.approx(made.bpb, rel=1e-6)
    assert bits < made.layer_bits < 1.25 * bits + 0.2
    container = Container.open(made.path)
    state, packed = read_state(container), read_packed(container)
    weight = state["layers.0.mlp.out.weight"]
    if "prune" in changes:
        assert torch.equal(packed["layers.0.mlp.out.weight"], weight)
        assert float((weight == 0).float().mean()) == pytest.approx(0.5, abs=0.05)
        assert made.rise > 0
    else:
        assert abs(made.rise) < 1e-3 * made.base
        scale = weight.abs().max(dim=1).values / 127
        original = cllm.load(trained).model.state_dict()["layers.0.mlp.out.weight"]
        assert bool(((weight - original).abs() <= scale[:, None] * 0.51).all())


def test_patterns_are_read_and_others_refused() -> None:
    assert parse_pattern("50%") == parse_pattern("0.5") == Pattern(share=0.5)
    assert parse_pattern("2:4") == Pattern(share=0.5, of=4)
    for text in ("", "100%", "0", "1:4", "half", "-5%", "nan"):
        with pytest.raises(ValueError, match="takes a share"):
            parse_pattern(text)
    with pytest.raises(UsageError, match="--prune stores what is left by"):
        Settings(prune="50%")
    with pytest.raises(UsageError, match="--prune stores what is left by"):
        Settings(prune="50%", method="babai", grid="coded")
    with pytest.raises(UsageError, match="takes a share"):
        Settings(prune="lots", method="fp16")


def test_the_command_prunes_in_fp16_if_nothing_else_is_said(
    trained: Path, isolated: Path, cllm: Any
) -> None:
    result = cllm("compress", trained, "--prune", "50%", "--tokens", 256, "--table", "fp16", "-q",
                  "--out", "a.cllm")  # fmt: skip
    assert result.code == 0, result.err
    header = Container.open("a.cllm").header
    assert header.weights["layers.0.mlp.out.weight"].kind == "sparse"
    assert header.method["method"] == "fp16"

"""Another basis of the same lattice: the same table and better figures, or word that nothing was gained."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.model.rebase import basis_facts, rebase


def skewed(rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Core (30, rank) and a far from orthogonal basis (rank, rank + 4), float64."""
    generator = torch.Generator().manual_seed(seed)
    core = torch.randn(30, rank, generator=generator, dtype=torch.float64)
    basis = torch.randn(rank, rank + 4, generator=generator, dtype=torch.float64)
    return core, basis + 2 * basis[:1]


@settings(max_examples=20)
@given(st.integers(2, 12), st.integers(0, 2**31), st.sampled_from(["lll", "bkz", "hkz"]))
def test_the_table_stays_the_same(rank: int, seed: int, method: str) -> None:
    core, basis = skewed(rank, seed)
    found = rebase(core, basis, method)
    torch.testing.assert_close(found.core @ found.basis, core @ basis, rtol=1e-9, atol=1e-9)
    assert abs(round(np.linalg.det(found.transform.astype(float)))) == 1
    assert found.after.log2_defect <= found.before.log2_defect + 1e-9
    assert sum(found.after.profile) == pytest.approx(sum(found.before.profile), abs=1e-6)
    assert found.after.shortest == pytest.approx(found.before.shortest, rel=1e-6)
    assert found.after.shortest_is_exact


def test_orthogonal_rows_are_only_reordered_and_it_is_said() -> None:
    rows, _ = torch.linalg.qr(torch.randn(9, 6, dtype=torch.float64))
    basis = rows.T * torch.linspace(3, 1, 6, dtype=torch.float64)[:, None]
    found = rebase(torch.randn(5, 6, dtype=torch.float64), basis, "lll")
    assert found.is_trivial
    assert found.after.log2_defect == pytest.approx(0, abs=1e-6)
    assert not rebase(*skewed(6, 1), "lll").is_trivial


@settings(max_examples=20)
@given(st.integers(2, 10), st.integers(0, 2**31), st.sampled_from(["lll", "hkz"]))
def test_under_a_metric_the_table_stays_and_the_figures_are_the_metrics(
    rank: int, seed: int, method: str
) -> None:
    core, basis = skewed(rank, seed)
    metric = some_metric(basis.shape[1], seed)
    found = rebase(core, basis, method, metric)
    torch.testing.assert_close(found.core @ found.basis, core @ basis, rtol=1e-8, atol=1e-8)
    assert abs(round(np.linalg.det(found.transform.astype(float)))) == 1
    torch.testing.assert_close(
        torch.from_numpy(found.transform.astype(float)) @ basis, found.basis, rtol=1e-9, atol=1e-9
    )
    # The Gram matrix R·M·Rᵀ by its Cholesky factor, another square root than the one used.
    for rows, facts in ((basis, found.before), (found.basis, found.after)):
        gram = rows.numpy() @ metric @ rows.numpy().T
        factor = np.linalg.cholesky(gram)
        assert facts.profile == pytest.approx(np.log2(np.diag(factor)), abs=1e-6)
        lengths = np.log2(np.sqrt(np.diag(gram))).sum()
        assert facts.log2_defect == pytest.approx(lengths - sum(facts.profile), abs=1e-6)
    assert found.after.log2_defect <= found.before.log2_defect + 1e-9
    assert found.after.shortest == pytest.approx(found.before.shortest, rel=1e-6)


def some_metric(width: int, seed: int) -> np.ndarray:
    """Half the identity, half the moment of a few strong directions."""
    states = np.random.default_rng(seed).standard_normal((4, width)) * 3
    return (np.eye(width) + states.T @ states) / 2


def test_orthogonal_rows_are_not_orthogonal_under_a_metric_and_reduction_tells() -> None:
    rows, _ = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64))
    core = torch.randn(5, 9, dtype=torch.float64)
    metric = some_metric(9, 2)
    plain, found = rebase(core, rows, "lll"), rebase(core, rows, "lll", metric)
    assert plain.is_trivial
    assert not found.is_trivial
    assert found.after.log2_defect < found.before.log2_defect - 0.5
    same = rebase(core, rows, "lll", np.eye(9))
    torch.testing.assert_close(same.basis, plain.basis)


def test_what_is_no_metric_is_refused() -> None:
    core, basis = skewed(4, 3)
    for metric, message in (
        (np.eye(7), r"\(7, 7\) does not fit a table of 8 columns"),
        (np.full((8, 8), np.nan), "NaN"),
        (-np.eye(8), "not positive"),
    ):
        with pytest.raises(ValueError, match=message):
            rebase(core, basis, "lll", metric)


def test_a_shortest_vector_beyond_enumeration_is_flagged() -> None:
    basis = torch.randn(44, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert not basis_facts(basis).shortest_is_exact
    assert basis_facts(basis[:10]).shortest_is_exact


def test_what_cannot_be_reduced_is_refused() -> None:
    core, basis = skewed(60, 3)
    with pytest.raises(ValueError, match="hkz enumerates in 60 dimensions"):
        rebase(core, basis, "hkz")
    spoiled = core.clone()
    spoiled[2, 1] = torch.nan
    with pytest.raises(
        ValueError, match=r"the core of shape .* holds NaN or infinity; take an earlier"
    ):
        rebase(spoiled, basis, "lll")
    basis[3] = basis[1]
    with pytest.raises(ValueError, match="row 3"):
        rebase(core, basis, "lll")
    with pytest.raises(ValueError, match="method"):
        rebase(*skewed(4, 3), "gauss")

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


def test_a_shortest_vector_beyond_enumeration_is_flagged() -> None:
    basis = torch.randn(44, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert not basis_facts(basis).shortest_is_exact
    assert basis_facts(basis[:10]).shortest_is_exact


def test_what_cannot_be_reduced_is_refused() -> None:
    core, basis = skewed(60, 3)
    with pytest.raises(ValueError, match="hkz enumerates in 60 dimensions"):
        rebase(core, basis, "hkz")
    basis[3] = basis[1]
    with pytest.raises(ValueError, match="row 3"):
        rebase(core, basis, "lll")
    with pytest.raises(ValueError, match="method"):
        rebase(*skewed(4, 3), "gauss")

"""Every kind of token table: its fold, its start from a dense table, its kept core, what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch.autograd import gradcheck

from cllm.core.model_config import EmbeddingConfig, ModelConfig
from cllm.lattice import E8
from cllm.model.embedding import Embedding
from cllm.model.factors import best_factors, rank_for, retained, spectrum
from cllm.model.incidence import Incidence
from cllm.model.snap import Snap, snap

V, D, P = 20, 16, 27
KINDS: list[dict[str, Any]] = [
    {"kind": "dense"},
    {"kind": "reduced", "rank": 6},
    {"kind": "composed", "pieces": P, "nonzeros": 3 * V},
    {"kind": "composed+reduced", "rank": 8, "pieces": P, "nonzeros": 3 * V},
    {"kind": "dense", "lattice": "z"},
    {"kind": "composed", "lattice": "e8", "pieces": P, "nonzeros": 3 * V},
    {"kind": "reduced", "rank": 8, "lattice": "reduced", "lattice_step": 0.003},
]

Make = Callable[..., Embedding]


@pytest.fixture
def make(incidence_of: Callable[[int, int], Any]) -> Make:
    """A started float64 embedding of one of ``KINDS``."""

    def one(fields: dict[str, Any], tokens: int = V) -> Embedding:
        embedding = Embedding(tokens, D, EmbeddingConfig(**fields)).double()
        if embedding.incidence is not None:
            embedding.incidence.set(incidence_of(tokens, P))
        embedding.start(torch.Generator().manual_seed(1))
        return embedding

    return one


@pytest.mark.parametrize("fields", KINDS, ids=str)
def test_look_ups_and_scores_are_those_of_the_folded_table(fields: dict, make: Make) -> None:
    embedding = make(fields)
    table = embedding.table()
    assert table.shape == (V, D)
    ids, h = torch.tensor([[3, 0], [19, 3]]), torch.randn(5, D, dtype=torch.float64)
    torch.testing.assert_close(embedding.embed(ids), table[ids], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(embedding.logits(h), h @ table.T, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("fields", KINDS[:4], ids=str)
def test_a_random_start_has_the_scale_that_was_asked_for(fields: dict, make: Make) -> None:
    many = dict(fields)
    if "pieces" in many:
        many["nonzeros"] = 3 * 2000
    assert make(many, tokens=2000).table().std().item() == pytest.approx(0.02, rel=0.15)


@pytest.mark.parametrize("kind", ["reduced", "composed+reduced"])
def test_a_table_of_low_rank_is_taken_over_exactly(kind: str, make: Make) -> None:
    fields = next(f for f in KINDS if f["kind"] == kind)
    generator = torch.Generator().manual_seed(4)
    left = torch.randn(V, fields["rank"], generator=generator, dtype=torch.float64)
    right = torch.randn(fields["rank"], D, generator=generator, dtype=torch.float64)
    embedding = make(fields)
    embedding.set_table(left @ right)
    torch.testing.assert_close(embedding.table(), left @ right, rtol=1e-4, atol=1e-5)


def test_a_reduced_table_is_the_best_of_its_rank(make: Make) -> None:
    table = torch.randn(V, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    embedding = make(KINDS[1])
    embedding.set_table(table)
    lost = (embedding.table() - table).square().sum()
    tail = torch.linalg.svdvals(table)[6:].square().sum()  # Eckart and Young
    torch.testing.assert_close(lost, tail, rtol=1e-9, atol=0)
    assert retained(table, 6) == pytest.approx(1 - float(tail / table.square().sum()), rel=1e-9)


def test_pieces_leave_a_residual_that_they_cannot_explain(
    make: Make, incidence_of: Callable[[int, int], Any]
) -> None:
    few = {"kind": "composed", "pieces": 9, "nonzeros": 3 * V}
    embedding = Embedding(V, D, EmbeddingConfig(**few)).double()
    embedding.incidence.set(incidence_of(V, 9))
    table = torch.randn(V, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    embedding.set_table(table)
    matrix = torch.from_numpy(incidence_of(V, 9).toarray())
    residual = table - embedding.table()
    assert residual.norm() > 0.1
    assert (matrix.T @ residual).abs().max() < 1e-4  # orthogonal to all that pieces can do


@pytest.mark.parametrize("fields", KINDS[2:], ids=str)
def test_the_kept_core_follows_the_weights(fields: dict, make: Make) -> None:
    embedding = make(fields)
    with torch.no_grad():
        first = embedding.core()
        assert embedding.core() is first
        other = make(fields)
        for parameter in other.parameters():
            parameter.mul_(2)
        embedding.load_state_dict(other.state_dict())
        assert not torch.equal(embedding.core(), first)
        torch.testing.assert_close(embedding.core(), other.core(), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(V + 1, D), (V, D - 1), (V,)])
def test_a_table_of_another_shape_is_refused(shape: tuple[int, ...], make: Make) -> None:
    with pytest.raises(ValueError, match=r"shape .* the embedding \(20, 16\)"):
        make(KINDS[0]).set_table(torch.zeros(shape))


def test_a_table_that_is_not_finite_is_refused(make: Make) -> None:
    table = torch.zeros(V, D)
    table[3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"holds NaN or infinity; take an earlier"):
        make(KINDS[1]).set_table(table)


def test_the_incidence_has_the_gradient_of_finite_differences(
    incidence_of: Callable[[int, int], Any],
) -> None:
    incidence = Incidence(V, P, 3 * V)
    incidence.set(incidence_of(V, P))
    weight = torch.randn(P, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(incidence, (weight,))
    dense = torch.from_numpy(incidence_of(V, P).toarray())
    torch.testing.assert_close(incidence(weight), dense @ weight, rtol=1e-12, atol=1e-14)
    grad = torch.randn(V, 3, dtype=torch.float64)
    torch.testing.assert_close(incidence.pull(grad), dense.T @ grad, rtol=1e-12, atol=1e-14)


def test_an_incidence_of_another_size_or_with_an_empty_token_is_refused(
    incidence_of: Callable[[int, int], Any],
) -> None:
    with pytest.raises(ValueError, match="20 tokens, 27 pieces and 60 non-zeros does not fit"):
        Incidence(V, P, 3 * V + 1).set(incidence_of(V, P))
    empty = incidence_of(V, P).tolil()
    empty[4] = 0
    with pytest.raises(ValueError, match="token 4 of 20 has no piece"):
        Incidence(V, P, 3 * V - 3).set(empty.tocsr())


@given(st.integers(0, 2**31), st.floats(1e-3, 1.0))
def test_snapped_coordinates_are_the_nearest_points(seed: int, step: float) -> None:
    core = torch.randn(5, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    plain = snap(core, None, "z", step)
    assert ((plain - core).abs() <= step / 2 * (1 + 1e-9)).all()
    gosset = snap(core, None, "e8", step)
    assert E8().contains(gosset / step).all()
    assert ((gosset - core).norm(dim=1) <= step * (1 + 1e-9)).all()  # E8's covering radius is 1
    units = Snap("e8", step).integers(gosset)
    torch.testing.assert_close(units.double() * (step / 2), gosset, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("lattice", ["e8", "reduced"])
@pytest.mark.parametrize("far", [1e9, torch.nan])
def test_coordinates_beyond_what_floats_resolve_have_no_point(lattice: str, far: float) -> None:
    core = torch.ones(3, 8)
    core[1, 2] = far
    assert snap(core, torch.eye(8), lattice, 0.01).isnan().all()


@given(st.integers(0, 2**31))
def test_nearest_plane_rounds_better_than_each_coordinate_by_itself(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    core = torch.randn(200, 6, generator=generator, dtype=torch.float64)
    basis = torch.eye(6, 10, dtype=torch.float64)
    basis += 0.4 * torch.randn(6, 10, generator=generator, dtype=torch.float64)
    found = snap(core, basis, "reduced", 0.5)
    multiples = found / 0.5
    torch.testing.assert_close(multiples, multiples.round(), rtol=0, atol=1e-9)
    simple = snap(core, None, "z", 0.5)
    errors = [((core - point) @ basis).square().sum() for point in (found, simple)]
    assert errors[0] <= errors[1] * 1.02


@given(st.integers(1, 12), st.integers(0, 2**31))
def test_the_rank_for_a_share_is_the_least_one(rank: int, seed: int) -> None:
    table = torch.randn(30, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    share = retained(table, rank)
    assert rank_for(table, share * (1 - 1e-9)) == rank
    assert rank_for(table, 1.0) == 12
    assert np.all(np.diff(spectrum(table)) <= 1e-9)
    core, basis = best_factors(table, rank)
    gram = basis @ basis.T
    torch.testing.assert_close(gram, torch.eye(rank, dtype=torch.float64) * 12 / rank)
    assert core.shape == (30, rank)


@pytest.mark.parametrize("share", [0.0, 1.5, -1.0])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="share to retain"):
        rank_for(torch.eye(3), share)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 4}, "model.embedding.rank needs a basis"),
        ({"reduction": "lll"}, "model.embedding.reduction needs a basis"),
        ({"lattice": "reduced", "kind": "composed"}, "'reduced' needs a basis"),
        ({"rank": 17, "kind": "reduced"}, "rank = 17 is above model.d_model = 16; lower it"),
        ({"rank": 6, "kind": "reduced", "lattice": "e8"}, "eight coordinates at a time"),
    ],
)
def test_combinations_that_cannot_be_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ModelConfig(d_model=16, embedding=EmbeddingConfig(**fields))

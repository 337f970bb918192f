"""The graph for ONNX and torch: the model's own function for every kind, whole and by a cache."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from cllm.export.check import batches
from cllm.export.graph import Affine, Cached, Whole, graph_model
from cllm.export.source import Source
from cllm.model.norms import BatchNorm, folded
from cllm.model.transformer import Transformer

SourceOf = Callable[..., Source]


def through_cache(model: Transformer, ids: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    """Logits of ids piece by piece."""
    config = model.config
    empty = torch.zeros(len(ids), config.kv_heads, 0, config.head_dim)
    past, parts = [empty] * (2 * config.n_layers), []
    for piece in torch.tensor_split(ids, cuts, dim=1):
        logits, *past = Cached(model)(piece, past)
        parts.append(logits)
    return torch.cat(parts, dim=1)


def test_graph_is_the_models_function(kind: str, source_of: SourceOf) -> None:
    source = source_of(kind)
    made = graph_model(source.model)
    assert not any(isinstance(module, BatchNorm) for module in made.modules())
    with torch.no_grad():
        for ids in map(torch.from_numpy, batches(source, 6)):
            want = source.model(ids)
            torch.testing.assert_close(Whole(made)(ids), want, atol=2e-5, rtol=1e-5)
            cuts = [ids.shape[1] // 2] if ids.shape[1] > 1 else []
            torch.testing.assert_close(through_cache(made, ids, cuts), want, atol=2e-5, rtol=1e-5)


def test_reduced_tables_keep_their_two_factors(source_of: SourceOf) -> None:
    made = graph_model(source_of("composed+reduced").model)
    assert made.embedding.basis is not None
    assert tuple(made.embedding.weight.shape) == (made.config.vocab_size, 16)


def test_batch_norm_is_a_factor_and_a_shift(source_of: SourceOf) -> None:
    norm = source_of("batchnorm").model.norm
    assert isinstance(norm, BatchNorm)
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(Affine(norm)(x), norm(x), atol=1e-6, rtol=1e-5)
    assert not torch.allclose(folded(norm)[0], torch.ones(64), atol=0.1)


@pytest.mark.parametrize("kind", ["batchnorm", "reduced"])
def test_the_source_is_not_changed(kind: str, source_of: SourceOf) -> None:
    source = source_of(kind)
    before = {name: value.clone() for name, value in source.model.state_dict().items()}
    graph_model(source.model)
    for name, value in source.model.state_dict().items():
        assert torch.equal(value, before[name])

"""The model: what it may see, how it starts, and that its paths agree."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from cllm.core.model_config import ModelConfig
from cllm.core.presets import PRESETS
from cllm.model.attention import KeyValueCache, rotary_tables, rotate
from cllm.model.norms import NORMS, BatchNorm, Statistics
from cllm.model.transformer import Transformer, flops_per_token, parameter_count

Make = Callable[..., Transformer]
Lively = Callable[[Transformer], Transformer]


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    """(3, 8) tokens."""
    return torch.randint(0, 19, (3, 8), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("attention", ["matmul", "sdpa"])
@pytest.mark.parametrize("norm", list(NORMS))
def test_a_future_token_changes_nothing_in_the_past(
    norm: str,
    attention: str,
    training: bool,
    ids: torch.Tensor,
    model_of: Make,
    lively: Lively,
) -> None:
    model = lively(model_of(norm=norm, attention=attention)).train(training)
    before = model(ids)
    for position in range(1, 8):
        changed = ids.clone()
        changed[1, position] = (
            changed[1, position] + 5
        ) % 19  # one window among those of its batch
        after = model(changed)
        assert torch.equal(after[:, :position], before[:, :position])
        assert not torch.allclose(after[1, position], before[1, position])


@pytest.mark.parametrize(
    "fields", [{}, {"n_kv_heads": 2}, {"n_kv_heads": 1}, {"positions": "learned"}]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_both_attention_paths_are_the_same_function(
    fields: dict, dtype: torch.dtype, ids: torch.Tensor, model_of: Make, lively: Lively
) -> None:
    one = lively(model_of(attention="matmul", dtype=dtype, **fields))
    other = lively(model_of(attention="sdpa", dtype=dtype, **fields))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(one(ids), other(ids), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("attention", ["matmul", "sdpa"])
@pytest.mark.parametrize(
    "fields", [{}, {"n_kv_heads": 2}, {"positions": "learned"}, {"norm": "batchnorm"}]
)
def test_a_cache_in_pieces_equals_the_whole(
    fields: dict, attention: str, ids: torch.Tensor, model_of: Make, lively: Lively
) -> None:
    model = lively(model_of(attention=attention, **fields)).eval()
    whole = model(ids).detach()
    for cuts in ([1] * 8, [3, 1, 4], [7, 1], [8]):
        cache = KeyValueCache(model.config, 3, model.embedding.table())
        with torch.no_grad():
            pieces = [model(part, cache) for part in ids.split(cuts, dim=1)]
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-11, atol=1e-11)
        assert cache.length == 8


@pytest.mark.parametrize("preset", ["nano", "tiny"])
def test_the_loss_at_the_start_is_that_of_a_uniform_guess(preset: str) -> None:
    vocab = 512
    model = Transformer(ModelConfig(**PRESETS[preset], vocab_size=vocab))
    model.start(0)
    ids = torch.randint(0, vocab, (4, 65), generator=torch.Generator().manual_seed(1))[:, :65]
    length = min(64, model.config.context)
    logits = model(ids[:, :length])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1 : length + 1].flatten())
    assert loss.item() == pytest.approx(math.log(vocab), rel=0.02)


def test_rotary_products_depend_on_distance_alone() -> None:
    cos, sin = (table.double() for table in rotary_tables(8, 20, 10_000.0))
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def product(i: int, j: int) -> float:
        turned = rotate(q, cos[i : i + 1], sin[i : i + 1]) * rotate(
            k, cos[j : j + 1], sin[j : j + 1]
        )
        return turned.sum().item()

    assert product(7, 3) == pytest.approx(product(19, 15), abs=1e-6)
    assert product(7, 3) != pytest.approx(product(7, 4), abs=1e-3)
    assert rotate(q, cos, sin).norm(dim=-1).flatten().tolist() == pytest.approx(
        [q.norm().item()] * 20
    )


def test_batch_norm_tells_what_it_observed_at_each_position() -> None:
    norm = BatchNorm(4, 1e-5).double()
    norm.name = "here"
    x = 3 + 2 * torch.randn(6, 5, 4, dtype=torch.float64)
    statistics: Statistics = []
    y = norm(x, statistics)
    assert torch.allclose(y.mean(0), torch.zeros(5, 4, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(
        y.var(0, unbiased=False), torch.ones(5, 4, dtype=torch.float64), atol=1e-4
    )
    names = [name for name, _ in statistics]
    assert names == ["here.running_mean", "here.running_square"]
    torch.testing.assert_close(statistics[0][1], x.mean((0, 1)))
    torch.testing.assert_close(statistics[1][1], x.square().mean((0, 1)))
    norm.running_mean.copy_(statistics[0][1])
    norm.running_square.copy_(statistics[1][1])
    pooled = norm.eval()(x)
    assert torch.allclose(pooled.mean((0, 1)), torch.zeros(4, dtype=torch.float64), atol=1e-9)


def test_low_precision_weights_leave_a_float32_residual_stream(
    ids: torch.Tensor, model_of: Make, lively: Lively
) -> None:
    exact = lively(model_of(dtype=torch.float32))
    rounded = lively(model_of(dtype=torch.float32))
    for parameter in rounded.parameters():
        parameter.data = parameter.data.bfloat16()
    seen = []
    rounded.layers[1].register_forward_hook(lambda module, given, made: seen.append(made.dtype))
    error = (rounded(ids) - exact(ids)).abs().max() / exact(ids).abs().max()
    assert seen == [torch.float32]
    assert 0 < error < 0.05


def test_the_start_is_a_function_of_the_seed(model_of: Make) -> None:
    def weights(seed: int) -> dict[str, torch.Tensor]:
        return model_of(seed=seed, dtype=torch.float32).state_dict()

    torch.manual_seed(99)
    first = weights(7)
    torch.manual_seed(100)
    for name, tensor in weights(7).items():
        assert torch.equal(tensor, first[name])
    assert not torch.equal(weights(8)["embedding.weight"], first["embedding.weight"])


def test_what_writes_into_the_residual_stream_starts_smaller() -> None:
    model = Transformer(ModelConfig(n_layers=8, vocab_size=64))
    model.start(1)
    stds = {name: p.std().item() for name, p in model.named_parameters() if p.dim() > 1}
    for name, std in stds.items():
        expected = 0.02 / 4 if ".out." in name else 0.02
        assert std == pytest.approx(expected, rel=0.05), name


def test_dropout_acts_in_training_alone(ids: torch.Tensor, model_of: Make, lively: Lively) -> None:
    for field in ("embedding_dropout", "attention_dropout", "residual_dropout"):
        for attention in ("matmul", "sdpa"):
            model = lively(model_of(attention=attention, **{field: 0.5}))
            plain = lively(model_of(attention=attention)).eval()(ids)
            assert torch.equal(model.eval()(ids), plain)
            assert not torch.allclose(model.train()(ids), plain), (field, attention)


def test_counts_of_parameters_and_operations() -> None:
    config = ModelConfig(vocab_size=4096)
    d, f, layers, v = 128, 384, 4, 4096
    matrices = layers * (4 * d * d + 3 * d * f)
    assert parameter_count(config) == v * d + matrices + (2 * layers + 1) * d
    assert flops_per_token(config) == 6 * (v * d + matrices) + 12 * layers * 128 * d
    untied = config.model_copy(update={"tie_embeddings": False, "n_kv_heads": 1})
    assert parameter_count(untied) == 2 * v * d + layers * (2.5 * d * d + 3 * d * f) + 9 * d
    assert parameter_count(untied) == sum(p.numel() for p in Transformer(untied).parameters())

"""Every block's gradient against finite differences, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.nn import functional

from cllm.core.model_config import EmbeddingConfig, ModelConfig
from cllm.model.attention import Attention, rotary_tables
from cllm.model.cross_entropy import IGNORE, cross_entropy_sum, linear_cross_entropy
from cllm.model.embedding import Embedding, add_rows
from cllm.model.mlp import MLPS
from cllm.model.norms import NORMS
from cllm.model.transformer import Block, Transformer

CONFIG = ModelConfig(d_model=8, n_layers=1, n_heads=4, d_ff=12, context=5, vocab_size=11)


def check(module: nn.Module, *inputs: Any) -> None:
    """Gradients of the inputs and of all parameters of ``module``, with random weights."""
    generator = torch.Generator().manual_seed(1)
    module.double()
    parameters = {
        name: (torch.randn(p.shape, generator=generator, dtype=torch.float64) / 2).requires_grad_()
        for name, p in module.named_parameters()
    }
    tensors = [x for x in inputs if isinstance(x, Tensor)]

    def call(*values: Tensor) -> Tensor:
        given = iter(values[: len(tensors)])
        arguments = [next(given) if isinstance(x, Tensor) else x for x in inputs]
        named = dict(zip(parameters, values[len(tensors) :], strict=True))
        return torch.func.functional_call(module, named, tuple(arguments))

    assert parameters
    assert gradcheck(call, (*tensors, *parameters.values()), atol=1e-6, rtol=1e-5)


@pytest.fixture
def x() -> Tensor:
    """(2, 5, 8) in float64."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, 5, 8, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", list(NORMS))
def test_norm(norm: str, training: bool, x: Tensor) -> None:
    check(NORMS[norm](8, 1e-5).train(training), x)


@pytest.mark.parametrize("mlp", list(MLPS))
def test_mlp(mlp: str, x: Tensor) -> None:
    check(MLPS[mlp](CONFIG), x)


@pytest.mark.parametrize("rotary", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("path", ["matmul", "sdpa"])
def test_attention(path: str, kv_heads: int, rotary: bool, x: Tensor) -> None:
    config = CONFIG.model_copy(update={"n_kv_heads": kv_heads})
    tables = tuple(t.double() for t in rotary_tables(config.head_dim, 5, 100.0)) if rotary else None
    check(Attention(config, 0, path), x, tables)


@pytest.mark.parametrize("norm", list(NORMS))
def test_block(norm: str, x: Tensor) -> None:
    config = CONFIG.model_copy(update={"norm": norm, "mlp": "gelu", "n_kv_heads": 2})
    check(Block(config, 0, "matmul"), x, None, None, None)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_whole_model(positions: str, tied: bool) -> None:
    config = CONFIG.model_copy(update={"positions": positions, "tie_embeddings": tied})
    ids = torch.tensor([[1, 4, 4, 9, 0], [2, 1, 10, 3, 3]])
    check(Transformer(config), ids)


def test_add_rows_is_the_transpose_of_a_look_up() -> None:
    ids = torch.tensor([1, 4, 4, 2, 1, 0])
    embedding = Embedding(5, 3, EmbeddingConfig()).double()
    embedding.start(torch.Generator().manual_seed(1))
    rows = torch.randn(6, 3, dtype=torch.float64)
    (grad,) = torch.autograd.grad((embedding.embed(ids) * rows).sum(), embedding.weight)
    assert torch.equal(add_rows(rows, ids, 5), grad)


@pytest.mark.parametrize("chunk", range(8))
def test_linear_cross_entropy_equals_autograd(chunk: int) -> None:
    generator = torch.Generator().manual_seed(chunk)
    h = torch.randn(7, 6, generator=generator, dtype=torch.float64).requires_grad_()
    table = (3 * torch.randn(13, 6, generator=generator, dtype=torch.float64)).requires_grad_()
    targets = torch.tensor([3, IGNORE, 12, 0, 3, IGNORE, 5])
    scale = torch.tensor(0.37, dtype=torch.float64)
    expected = functional.cross_entropy(h @ table.T, targets, ignore_index=IGNORE, reduction="sum")
    grads = torch.autograd.grad(expected * scale, (h, table))
    with torch.no_grad():
        loss, h_grad, table_grad = linear_cross_entropy(h, table, targets, scale, chunk)
        alone = cross_entropy_sum(h, table, targets, chunk)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(alone, expected.detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(h_grad, grads[0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(table_grad, grads[1], rtol=1e-12, atol=1e-14)
    assert torch.equal(h_grad[1], torch.zeros(6, dtype=torch.float64))


def test_linear_cross_entropy_with_finite_differences() -> None:
    generator = torch.Generator().manual_seed(5)
    h = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    table = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    targets, one = torch.tensor([3, 0, IGNORE, 3]), torch.tensor(1.0, dtype=torch.float64)
    _, h_grad, table_grad = linear_cross_entropy(h, table, targets, one)
    for tensor, grad in ((h, h_grad), (table, table_grad)):
        for place in range(tensor.numel()):
            losses = []
            for sign in (1, -1):
                moved = tensor.clone()
                moved.view(-1)[place] += sign * 1e-6
                pair = (moved, table) if tensor is h else (h, moved)
                losses.append(cross_entropy_sum(*pair, targets).item())
            measured = (losses[0] - losses[1]) / 2e-6
            assert measured == pytest.approx(grad.view(-1)[place].item(), abs=1e-8)


def test_linear_cross_entropy_without_any_target_is_zero() -> None:
    h, table = torch.randn(3, 4), torch.randn(5, 4)
    loss, h_grad, table_grad = linear_cross_entropy(
        h, table, torch.full((3,), IGNORE), torch.tensor(1.0)
    )
    assert loss == 0
    assert not h_grad.any()
    assert not table_grad.any()


def test_a_certain_target_keeps_its_digits_in_bf16() -> None:
    # p_y − 1 is 1e-7 here: in bf16 it would be 0, or off by a thousandfold.
    table = torch.tensor([[16.0, 0.0], [0.0, 16.0]], dtype=torch.bfloat16)
    h = torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16)
    _, _, table_grad = linear_cross_entropy(h, table, torch.tensor([0]), torch.tensor(1.0))
    assert table_grad[0, 0].item() == pytest.approx(-1.1253517e-07, rel=0.1)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunks_make_no_difference(chunk: int) -> None:
    h, table = torch.randn(10, 6), torch.randn(12, 6)
    targets = torch.randint(0, 12, (10,))
    whole = linear_cross_entropy(h, table, targets, torch.tensor(0.5))
    parts = linear_cross_entropy(h, table, targets, torch.tensor(0.5), chunk)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)

"""A file's integers go into the kernels as they are: products and logits are the dense matrices'."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cllm.core.errors import UsageError
from cllm.infer.engine import Engine, EngineOptions
from cllm.infer.stored import Int8Groups, head_of, matrix_of, misfit, summary
from cllm.infer.weights import Dense, Int4, Int8, Int8Dynamic
from cllm.model.transformer import Transformer
from cllm.store.packing import GridMatrix

Make = Callable[..., Transformer]


def grid(
    rows: int = 32, width: int = 128, bits: int = 4, group: int = 32, offsets: bool = False
) -> GridMatrix:
    """Random integers, all codes among them, with scales of very different sizes."""
    generator = torch.Generator().manual_seed(rows + 7 * width + bits)
    low, groups = -(2 ** (bits - 1)), -(-width // group)
    codes = torch.randint(low, -low, (rows, width), generator=generator)
    codes[:, 0], codes[:, -1] = low, -low - 1
    scale = 10 ** torch.empty(rows, groups).uniform_(-2, 0, generator=generator)
    scale[0] = 0  # a group of zeros is stored so
    offset = torch.randn(rows, groups, generator=generator).half() if offsets else None
    return GridMatrix(codes.to(torch.int8), scale.half(), offset, group, bits)


@settings(max_examples=60)
@given(
    rows=st.sampled_from([16, 20, 48]),
    width=st.sampled_from([32, 64, 90, 96, 128, 384]),
    bits=st.sampled_from([2, 3, 4, 8]),
    group=st.sampled_from([6, 32, 64, 128, 384]),
    offsets=st.booleans(),
    kind=st.sampled_from(["int8", "int4"]),
    count=st.sampled_from([1, 5]),
)
def test_products_are_those_of_the_dense_matrix_or_refused(
    rows: int, width: int, bits: int, group: int, offsets: bool, kind: str, count: int
) -> None:
    held = grid(rows, width, bits, min(group, width), offsets)
    dense = held.dense()
    if misfit(held, kind):
        with pytest.raises(UsageError, match=f"--weights {kind} cannot hold the file's integers"):
            matrix_of(dense, kind, held)
        return
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(1))
    found = matrix_of(dense, kind, held)(x)
    wanted = x.double() @ dense.double().T
    bound = 1e-6 * (x.double().abs() @ dense.double().abs().T) + 1e-9
    # Offsets and integers cancel in the dense matrix, and not in the kernel.
    apart = (
        held.dense() if held.offset is None else held.offset.abs().amax() * torch.ones_like(dense)
    )
    bound = bound + 1e-6 * (x.abs().double() @ apart.abs().double().T)
    assert bool(((found - wanted).abs() <= 4 * bound).all())


@pytest.mark.parametrize(
    ("kind", "facts", "module"),
    [
        ("int4", {"bits": 4}, Int4),
        ("int4", {"bits": 2, "offsets": True}, Int4),
        ("int4", {"bits": 3, "group": 128}, Int4),
        ("int8", {"bits": 8, "group": 128}, Int8),
        ("int8", {"bits": 8, "group": 64}, Int8Groups),
        ("int8", {"bits": 4, "group": 32}, Int8Groups),
    ],
    ids=str,
)
def test_what_fits_exactly_is_in_the_packed_kernel(kind: str, facts: dict, module: type) -> None:
    held = grid(**facts)
    assert not misfit(held, kind)
    assert isinstance(matrix_of(held.dense(), kind, held), module)


def test_dynamic_int8_has_the_files_integers() -> None:
    held = grid(bits=8, group=128)
    (weight, _) = matrix_of(held.dense(), "int8-dynamic", held).packed.unpack()
    assert torch.equal(weight.int_repr(), held.codes)
    assert torch.equal(weight.q_per_channel_scales().float(), held.scale[:, 0].float())


@pytest.mark.parametrize(
    ("kind", "facts", "reason"),
    [
        ("int4", {"bits": 8}, r"they have 8 bits; use int8 or fp32"),
        ("int4", {"rows": 20}, r"20 rows, no multiple of 16; use int8 or fp32"),
        ("int4", {"group": 16}, r"each 16 of 128 columns have a scale.* 256; use int8 or fp32"),
        ("int8", {"bits": 2, "offsets": True}, r"an offset beside the scale; use int4 or fp32"),
        ("int8", {"bits": 8, "width": 90, "group": 90}, r"int8 takes 4 columns together"),
        ("int8-dynamic", {"bits": 8, "group": 64}, r"has one for a row; use int8 or fp32"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_with_the_reason(kind: str, facts: dict, reason: str) -> None:
    held = grid(**facts)
    with pytest.raises(UsageError, match=reason):
        matrix_of(held.dense(), kind, held)
    assert isinstance(matrix_of(held.dense(), "fp32", held), Dense)


def test_a_table_is_of_integers_where_they_are_its_own_and_fit() -> None:
    held = grid(bits=8, group=128)
    assert isinstance(head_of(held.dense(), "int8", held), Int8)
    assert isinstance(head_of(held.dense(), "int4", held), Dense)
    assert isinstance(head_of(held.dense(), "int8", None), Dense)
    assert isinstance(head_of(held.dense() + 1, "int8", held), Dense)
    assert isinstance(head_of(held.dense()[:, :64], "int8", held), Dense)


FIT = {"d_model": 32, "n_heads": 2, "d_ff": 64, "vocab_size": 48}


FIELDS = [
    {},
    {"norm": "layernorm", "mlp": "gelu"},
    {"norm": "batchnorm", "tie_embeddings": False},
]


def model_and_integers(
    model_of: Make, bits: int, fields: dict[str, Any]
) -> tuple[Transformer, dict[str, GridMatrix]]:
    """A model whose matrices are integers; they lack their largest code in most rows, so that rounding
    them once more would change them."""
    model, integers = model_of(**FIT | fields).float().eval(), {}
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            rows, width = weight.shape
            held = grid(rows, width, bits, width)
            codes = held.codes.clone()
            codes[:, [0, -1]] = 3
            integers[name] = GridMatrix(codes, (held.scale * 0.02).half(), None, width, bits)
            weight.data.copy_(integers[name].dense())
    generator = torch.Generator().manual_seed(1)
    for name, buffer in model.named_buffers():
        if "running" in name:
            least = 1.0 if "square" in name else 0.0
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + least)
    return model, integers


def logits(engine: Engine) -> Tensor:
    return torch.stack([engine.start(0, [1, 2, 3]).logits[0], engine.step({0: 4}).logits[0]])


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_logits_are_those_of_the_dense_decode(
    kind: str, fields: dict[str, Any], model_of: Make
) -> None:
    bits = 4 if kind == "int4" else 8
    model, integers = model_and_integers(model_of, bits, fields)
    stored = Engine(model, EngineOptions(weights=kind), integers=integers)
    wanted, found = logits(Engine(model)), logits(stored)
    rounded = logits(Engine(model, EngineOptions(weights=kind)))
    scale = float(wanted.abs().max())
    assert float((found - wanted).abs().max()) < 1e-5 * scale
    assert float((rounded - wanted).abs().max()) > 1e-3 * scale
    assert stored.network.integers == f"{bits} bits in rows"


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_with_rounded_inputs_each_layer_is_the_dense_one(
    fields: dict[str, Any], model_of: Make
) -> None:
    """int8-dynamic rounds what goes into a layer, in 127 steps from its least to its largest number, zero
    among them; the layer's integers are not rounded, which its answers to its own inputs show."""
    model, integers = model_and_integers(model_of, 8, fields)
    engine = Engine(model, EngineOptions(weights="int8-dynamic"), integers=integers)
    calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def note(module: nn.Module, given: tuple[Tensor], made: Tensor) -> None:
        codes, _ = cast(Int8Dynamic, module).packed.unpack()
        calls.append((codes.dequantize().double(), given[0].double(), made.double()))

    for module in engine.network.modules():
        if isinstance(module, Int8Dynamic):
            module.register_forward_hook(note)
    found, wanted = logits(engine), logits(Engine(model))
    assert engine.network.integers == "8 bits in rows"
    # How far roundings of inputs reach depends on the averages of batch norm: they are the same each time.
    assert float((found - wanted).norm()) < 0.2 * float(wanted.norm())
    known = [matrix.dense().double() for matrix in integers.values()]
    assert len(calls) >= 2 * len(model.layers)
    for weight, x, made in calls:
        assert any(
            one.shape == weight.shape and torch.allclose(one, weight, rtol=1e-6) for one in known
        )
        step = (x.amax().clamp(min=0) - x.amin().clamp(max=0)) / 127
        bound = 0.51 * step * weight.abs().sum(1) + 1e-5 * x.abs() @ weight.abs().T
        assert bool(((made - x @ weight.T).abs() <= bound).all())


def test_a_summary_tells_all_kinds_of_layers() -> None:
    layers = {
        "layers.0.mlp.out.weight": grid(),
        "layers.0.mlp.up.weight": grid(bits=2, group=128, offsets=True),
        "embedding.weight": grid(bits=8),
    }
    assert summary(layers) == "2 bits in rows with offsets, 4 bits in groups of 32"

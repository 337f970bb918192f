"""A model as one graph that needs nothing of cllm: for ONNX, TorchScript and torch.export.

Tables are worked out, of a reduced one the two factors stay; batch norm, which is a fixed factor and
shift in inference, goes into the matrix after it. The second graph takes keys and values of earlier
positions and gives them back with the new ones.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from cllm.export.source import plain
from cllm.model.attention import Attention, KeyValueCache
from cllm.model.mlp import GELU, SwiGLU
from cllm.model.norms import BatchNorm, Statistics, folded, wide
from cllm.model.transformer import Block, Transformer


class Affine(nn.Module):
    """x · scale + shift: batch norm in inference."""

    def __init__(self, norm: BatchNorm) -> None:
        super().__init__()
        scale, shift = folded(norm)
        self.scale, self.shift = nn.Parameter(scale), nn.Parameter(shift)

    def forward(self, x_btd: Tensor, statistics: Statistics | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return wide(x_btd) * self.scale + self.shift


class Passed(nn.Module):
    """x: where the norm went into the matrix after it."""

    def forward(self, x_btd: Tensor, statistics: Statistics | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return x_btd


def graph_model(model: Transformer) -> Transformer:
    """The same function of ids with plain tables and without batch norm."""
    made = plain(model, factors=True)
    for block in made.layers:
        assert isinstance(block, Block)
        if isinstance(block.attention_norm, BatchNorm):
            assert isinstance(block.attention, Attention)
            block.attention.qkv = _folded(block.attention_norm, block.attention.qkv)
            block.attention_norm = cast(BatchNorm, Passed())
        if isinstance(block.mlp_norm, BatchNorm):
            _fold_mlp(block, block.mlp_norm)
    if isinstance(made.norm, BatchNorm):
        # The table after it is the input's, too: it stays a factor and a shift.
        made.norm = cast(BatchNorm, Affine(made.norm))
    for parameter in made.parameters():
        parameter.requires_grad_(False)
    return made.eval()


def _fold_mlp(block: Block, norm: BatchNorm) -> None:
    mlp = block.mlp
    if isinstance(mlp, SwiGLU):
        mlp.gate_up = _folded(norm, mlp.gate_up)
    else:
        assert isinstance(mlp, GELU)
        mlp.up = _folded(norm, mlp.up)
    block.mlp_norm = cast(BatchNorm, Passed())


def _folded(norm: BatchNorm, linear: nn.Linear) -> nn.Linear:
    """W (x · scale + shift) as (W · scale) x + W shift."""
    scale, shift = folded(norm)
    weight = linear.weight.detach()
    made = nn.Linear(linear.in_features, linear.out_features, bias=True)
    made.weight.data = weight * scale
    made.bias.data = (weight.double() @ shift.double()).float()
    return made


class Whole(nn.Module):
    """ids (B, T) -> logits (B, T, V)."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits of whole texts."""
        return cast(Tensor, self.model(input_ids))


class Cached(nn.Module):
    """ids (B, T) after P earlier positions -> logits (B, T, V), and keys and values of all P + T.

    ``past`` holds a key and a value for each layer in turn, each (B, H, P, K).
    """

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        """Logits, then keys and values in the order of ``past``."""
        cache = _Growing(past)
        logits = self.model(input_ids, cast(KeyValueCache, cache))
        return (logits, *cache.present)


class _Growing:
    """A cache as the model's blocks call it, which gives back what it held and what came."""

    def __init__(self, past: list[Tensor]) -> None:
        self.past = past
        self.present: list[Tensor] = []
        self.length = past[0].shape[2]

    def extend(self, layer: int, k_bhtk: Tensor, v_bhtk: Tensor) -> tuple[Tensor, Tensor]:
        k = torch.cat([self.past[2 * layer], k_bhtk], dim=2)
        v = torch.cat([self.past[2 * layer + 1], v_bhtk], dim=2)
        self.present += [k, v]
        return k, v


def cache_names(layers: int, what: str) -> list[str]:
    """``past.0.key``, ``past.0.value``, … (``what`` is ``past`` or ``present``)."""
    return [f"{what}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]

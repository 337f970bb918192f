"""Causal self-attention with grouped queries and rotary positions.

Two paths compute the same function. ``sdpa`` is torch's fused kernel. ``matmul`` writes the two
products out, so that ``torch.compile`` fuses mask, softmax and casts between them: in bf16 on CPUs
the fused kernel's backward was measured to take nearly half of a training step at small head widths.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from cllm.core.model_config import ModelConfig


def rotary_tables(head_dim: int, length: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, each (length, head_dim), of rotary positions (Su et al. 2021), in float32 on the CPU."""
    # Whatever the default device: on "meta", where models are only counted, arithmetic costs torch seconds
    # of imports.
    frequency = theta ** (
        -torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim
    )
    angle = torch.arange(length, dtype=torch.float64, device="cpu")[:, None] * frequency
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos().float(), angle.sin().float()


def rotate(x_bhtk: Tensor, cos_tk: Tensor, sin_tk: Tensor) -> Tensor:
    """Rotary positions applied to (B, H, T, K): the pairs are (i, i + K/2), as in Llama."""
    left, right = x_bhtk.chunk(2, dim=-1)
    turned = torch.cat([-right, left], dim=-1)
    return (x_bhtk * cos_tk + turned * sin_tk).to(x_bhtk.dtype)


class KeyValueCache:
    """Keys and values of the positions seen so far, in buffers of fixed capacity, for generation."""

    def __init__(self, config: ModelConfig, batch: int, like: Tensor) -> None:
        shape = (config.n_layers, 2, batch, config.kv_heads, config.context, config.head_dim)
        self.buffer = like.new_empty(shape)
        self.length = 0

    def extend(self, layer: int, k_bhtk: Tensor, v_bhtk: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values after ``length`` and return all of the layer's up to there."""
        end = self.length + k_bhtk.shape[2]
        keys, values = self.buffer[layer]
        keys[:, :, self.length : end] = k_bhtk
        values[:, :, self.length : end] = v_bhtk
        return keys[:, :, :end], values[:, :, :end]


class Attention(nn.Module):
    """Multi-head causal attention; ``path`` is ``"matmul"`` or ``"sdpa"``."""

    def __init__(self, config: ModelConfig, layer: int, path: str) -> None:
        super().__init__()
        self.layer, self.path = layer, path
        self.heads, self.kv_heads, self.head_dim = config.n_heads, config.kv_heads, config.head_dim
        self.dropout = config.attention_dropout
        rows = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv = nn.Linear(config.d_model, rows, bias=False)
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(
        self,
        x_btd: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D); ``rotary`` holds the tables' rows of these T positions."""
        batch, length, _ = x_btd.shape
        groups = (self.heads, self.kv_heads, self.kv_heads)
        qkv = self.qkv(x_btd).view(batch, length, sum(groups), self.head_dim).transpose(1, 2)
        q, k, v = qkv.split(groups, dim=1)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        if self.kv_heads != self.heads:
            k = k.repeat_interleave(self.heads // self.kv_heads, dim=1)
            v = v.repeat_interleave(self.heads // self.kv_heads, dim=1)
        dropout = self.dropout if self.training else 0.0
        attend = attend_matmul if self.path == "matmul" else attend_sdpa
        mixed = attend(q, k, v, dropout)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, -1))


def causal_bias(length: int, total: int, like: Tensor) -> Tensor:
    """(length, total): 0 where a query may look, −inf at what comes after it."""
    bias = torch.full((length, total), float("-inf"), device=like.device, dtype=like.dtype)
    return bias.triu(total - length + 1)


def attend_matmul(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """softmax(q kᵀ / √K + mask) v over (B, H, T, K), the softmax in float32 at least."""
    scores = q @ k.transpose(-1, -2)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * q.shape[-1] ** -0.5
    scores = scores + causal_bias(q.shape[2], k.shape[2], scores)
    weights = torch.softmax(scores, dim=-1).to(v.dtype)
    return functional.dropout(weights, dropout, training=dropout > 0) @ v


def attend_sdpa(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """The same by torch's fused kernel."""
    if q.shape[2] == k.shape[2]:
        return functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    bias = causal_bias(q.shape[2], k.shape[2], q)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)

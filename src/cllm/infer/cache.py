"""Keys and values of what was read, in buffers that are made once: slots × heads × capacity × width."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cllm.core.errors import UsageError, nearest
from cllm.core.model_config import ModelConfig

KINDS = ("fp32", "bf16", "int8")
"""What a cache may hold. ``fp32`` is the residual stream's precision (float64 for a float64 model)."""

Entry = Sequence[Tensor]
"""The buffers of a layer's keys, or of its values: (S, H, C, K), and for int8 the scales (S, H, C, 1)."""


def check_kind(kind: str) -> None:
    """Raises ``UsageError`` if no cache holds this ``kind`` of numbers."""
    if kind not in KINDS:
        known = ", ".join(KINDS)
        raise UsageError(f"cache {kind!r} is none of {known}{nearest(kind, KINDS)}")


class Cache:
    """Buffers for ``slots`` texts of up to ``capacity`` tokens.

    int8 keeps each position's key of each head as integers in −127…127 times a scale of its own, and the
    values likewise.
    """

    def __init__(
        self, config: ModelConfig, slots: int, capacity: int, kind: str, like: Tensor
    ) -> None:
        check_kind(kind)
        self.kind, self.slots, self.capacity = kind, slots, capacity
        shape = (slots, config.kv_heads, capacity, config.head_dim)
        stored = {"fp32": like.dtype, "bf16": torch.bfloat16, "int8": torch.int8}[kind]
        self.buffers: list[Tensor] = []
        # Zeros, not whatever was there: what is not yet written is masked by adding −inf, and NaN stays.
        for _ in range(2 * config.n_layers):
            self.buffers.append(torch.zeros(shape, dtype=stored, device=like.device))
            if kind == "int8":
                scales = torch.zeros((*shape[:3], 1), dtype=like.dtype, device=like.device)
                self.buffers.append(scales)

    @property
    def bytes(self) -> int:
        """What the buffers take."""
        return sum(t.numel() * t.element_size() for t in self.buffers)


def entries(buffers: Sequence[Tensor], kind: str) -> list[tuple[Entry, Entry]]:
    """The buffers of each layer: (keys, values)."""
    width = 2 if kind == "int8" else 1
    parts = [buffers[i : i + width] for i in range(0, len(buffers), width)]
    return list(zip(parts[::2], parts[1::2], strict=True))


def encode(x: Tensor, entry: Entry) -> list[Tensor]:
    """Vectors (…, K) as the tensors that go into the buffers of ``entry``."""
    if len(entry) == 1:
        return [x.to(entry[0].dtype)]
    scale = x.abs().amax(-1, keepdim=True) / 127
    rounded = (x / scale.clamp_min(torch.finfo(x.dtype).tiny)).round().to(torch.int8)
    return [rounded, scale]


def store(entry: Entry, at: tuple[Tensor | int | slice, ...], x: Tensor) -> None:
    """Write vectors (…, K) at ``at``, an index of the buffers."""
    for buffer, part in zip(entry, encode(x, entry), strict=True):
        buffer[at] = part


def load(entry: Entry, dtype: torch.dtype) -> Tensor:
    """All vectors of a layer, (S, H, C, K)."""
    x = entry[0].to(dtype)
    return x if len(entry) == 1 else x * entry[1]

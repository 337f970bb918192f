"""Where the layers are cut into stages, and what one stage computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from cllm.core.config import Config
from cllm.model.attention import rotary_tables
from cllm.model.embedding import Embedding
from cllm.model.norms import wide


class Plan:
    """Which layers each stage has, and which process each stage."""

    def __init__(self, config: Config, size: int) -> None:
        pipeline = config.train.pipeline
        self.count = size * pipeline.stages_of_each
        parts = np.array_split(np.arange(config.model.n_layers), self.count)
        self.layers = [[int(layer) for layer in part] for part in parts]
        there = list(range(size))
        back = there[::-1] if pipeline.schedule == "zbv" else there
        self.ranks = (there + back)[: self.count]

    def stages_of(self, rank: int) -> list[int]:
        """The stages of a process, in order."""
        return [stage for stage, owner in enumerate(self.ranks) if owner == rank]

    def owner(self, name: str) -> int:
        """The process that has the parameter or buffer ``name`` (a tied table: the first that has it)."""
        head, _, rest = name.partition(".")
        if head == "layers":
            layer = int(rest.partition(".")[0])
            return next(r for s, r in enumerate(self.ranks) if layer in self.layers[s])
        return self.ranks[-1] if head in ("norm", "head") else self.ranks[0]


class Layers(nn.Module):
    """One stage's part of the model: (B, T) ids or (B, T, D) vectors to vectors, or logits (B, T, V)."""

    def __init__(self, own: nn.Module, config: Config, layers: list[int], ends: tuple[bool, bool]):
        super().__init__()
        model = config.model
        self.first, self.last = ends
        self.dropout = model.embedding_dropout
        self.layers = nn.ModuleList(own.get_submodule(f"layers.{layer}") for layer in layers)
        self.embedding = own.embedding if self.first else None
        self.positions: Any = own.positions if self.first else None
        self.norm: Any = own.norm if self.last else None
        tied = model.tie_embeddings
        self.head = (own.embedding if tied else own.head) if self.last else None
        self.tables = rotary_tables(model.head_dim, model.context, model.rope_theta)
        self.is_rotary = model.positions == "rope"

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            assert isinstance(self.embedding, Embedding)
            x = wide(self.embedding.embed(x))
            if self.positions is not None:
                x = x + self.positions[: x.shape[1]]
            x = functional.dropout(x, self.dropout, self.training)
        rotary = None
        if self.is_rotary:
            self.tables = tuple(table.to(x.device) for table in self.tables)  # type: ignore[assignment]
            cos, sin = self.tables
            rotary = cos[: x.shape[1]], sin[: x.shape[1]]
        for layer in self.layers:
            x = layer(x, rotary, None, None)
        if self.last:
            assert isinstance(self.head, Embedding)
            assert self.norm is not None
            x = wide(self.head.logits(self.norm(x)))
        return x


class Cast(nn.Module):
    """A stage whose arithmetic is in another precision than its weights."""

    def __init__(self, inner: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner, self.dtype = inner, dtype

    def forward(self, x: Tensor) -> Tensor:
        cast = {name: p.to(self.dtype) for name, p in self.inner.named_parameters()}
        found: Tensor = torch.func.functional_call(self.inner, cast, (x,))
        return found

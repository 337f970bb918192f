"""The network: token ids to hidden vectors to logits.

Weights may be in any floating precision; the residual stream, norms and softmax are kept in float32
(float64 for float64 weights), and matrix products are done in the weights' precision.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from cllm.core.model_config import ModelConfig
from cllm.model.attention import Attention, KeyValueCache, rotary_tables
from cllm.model.embedding import Embedding
from cllm.model.mlp import MLPS
from cllm.model.norms import (
    BatchNorm,
    LayerNorm,
    RMSNorm,
    Statistics,
    make_norm,
    start_norm,
    wide,
)

if TYPE_CHECKING:
    from scipy import sparse


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int, attention: str) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, layer, attention)
        self.mlp_norm = make_norm(config)
        self.mlp = MLPS[config.mlp](config)
        self.dropout = config.residual_dropout

    def forward(
        self,
        x_btd: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        cache: KeyValueCache | None,
        statistics: Statistics | None,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.feed(self.attend(x_btd, rotary, cache, statistics), statistics)

    def attend(
        self,
        x_btd: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        cache: KeyValueCache | None = None,
        statistics: Statistics | None = None,
    ) -> Tensor:
        """The first half."""
        mixed = self.attention(self.attention_norm(x_btd, statistics), rotary, cache)
        return x_btd + functional.dropout(mixed, self.dropout, self.training)

    def feed(self, x_btd: Tensor, statistics: Statistics | None = None) -> Tensor:
        """The second half."""
        made = self.mlp(self.mlp_norm(x_btd, statistics))
        return x_btd + functional.dropout(made, self.dropout, self.training)


class Transformer(nn.Module):
    """A decoder-only language model; with the default options, a Llama.

    ``attention`` is ``"matmul"`` or ``"sdpa"`` (see ``cllm.model.attention``).
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig, attention: str = "matmul") -> None:
        super().__init__()
        assert config.vocab_size is not None, "the vocabulary's size is resolved before the model"
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.d_model, config.embedding)
        self.positions: nn.Parameter | None = None
        if config.positions == "learned":
            self.positions = nn.Parameter(torch.empty(config.context, config.d_model))
        cos, sin = rotary_tables(config.head_dim, config.context, config.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.layers = nn.ModuleList(Block(config, i, attention) for i in range(config.n_layers))
        self.norm = make_norm(config)
        self.head: Embedding | None = None
        if not config.tie_embeddings:
            self.head = Embedding(config.vocab_size, config.d_model, config.embedding)
        for name, module in self.named_modules():
            if isinstance(module, BatchNorm):
                module.name = name

    def start(self, seed: int) -> None:
        """Fill all weights with their random start, a function of ``seed`` alone.

        Matrices have standard deviation 0.02; those that write into the residual stream are scaled
        down by √(2·layers) (GPT-2), so that its variance does not grow with depth.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, module in self.named_modules():
            if isinstance(module, Embedding):
                module.start(generator)
            elif isinstance(module, nn.Linear):
                depth = math.sqrt(2 * self.config.n_layers) if name.endswith(".out") else 1.0
                nn.init.normal_(module.weight, std=0.02 / depth, generator=generator)
            elif isinstance(module, RMSNorm | LayerNorm | BatchNorm):
                start_norm(module)
        if self.positions is not None:
            nn.init.normal_(self.positions, std=0.02, generator=generator)

    def set_incidence(self, matrix_vp: sparse.csr_matrix) -> None:
        """Tell composed tables which pieces (columns) make up each token (rows).

        Raises ``ValueError`` where the matrix is not of the configured size.
        """
        for table in self.tables.values():
            assert table.incidence is not None, "only composed tables have pieces"
            table.incidence.set(matrix_vp)
            table.after_step()

    @property
    def output(self) -> Embedding:
        """The table that scores tokens: the input's own where the two are tied."""
        return self.embedding if self.head is None else self.head

    @property
    def tables(self) -> dict[str, Embedding]:
        """The token tables by name, the one that is input and output once."""
        found = {"embedding": self.embedding}
        return found if self.head is None else found | {"head": self.head}

    @property
    def output_name(self) -> str:
        """The name of the table that scores."""
        return "embedding" if self.head is None else "head"

    def hidden(
        self,
        ids_bt: Tensor,
        cache: KeyValueCache | None = None,
        statistics: Statistics | None = None,
    ) -> Tensor:
        """Hidden vectors (B, T, D) of token ids (B, T): ``trunk`` over their embeddings."""
        return self.trunk(self.embedding.embed(ids_bt), cache, statistics)

    def trunk(
        self,
        vectors_btd: Tensor,
        cache: KeyValueCache | None = None,
        statistics: Statistics | None = None,
    ) -> Tensor:
        """Hidden vectors (B, T, D) after the last norm, in the weights' precision.

        With a ``cache``, the vectors continue what it holds, and it is extended. ``statistics``
        collects what batch norm observed. At most ``context`` positions fit.
        """
        begin = cache.length if cache is not None else 0
        end = begin + vectors_btd.shape[1]
        assert end <= self.config.context, f"{end} positions in a context of {self.config.context}"
        x_btd = wide(vectors_btd)
        rotary = None
        if self.positions is not None:
            x_btd = x_btd + self.positions[begin:end]
        else:
            rotary = (self.cos[begin:end], self.sin[begin:end])
        x_btd = functional.dropout(x_btd, self.config.embedding_dropout, self.training)
        for layer in self.layers:
            x_btd = layer(x_btd, rotary, cache, statistics)
        if cache is not None:
            cache.length = end
        return self.norm(x_btd, statistics)

    def forward(self, ids_bt: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Logits (B, T, V) in float32 at least."""
        return wide(self.output.logits(self.hidden(ids_bt, cache)))


def parameter_count(config: ModelConfig) -> int:
    """Learned numbers of the model, without building it."""
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(config).parameters())


def flops_per_token(config: ModelConfig, context: int | None = None) -> int:
    """Floating-point operations of forward and backward for one token.

    6 for each weight of a matrix product (the output table once, the input look-up not at all) and
    12·layers·context·d_model for attention's two products without regard to the causal half
    (Kaplan et al. 2020, appendix; PaLM 2022, appendix B).
    """
    assert config.vocab_size is not None
    length = context or config.context
    rank = config.embedding.rank_of(config.d_model)
    head = config.vocab_size * rank + (rank * config.d_model if config.embedding.is_reduced else 0)
    widths = {"swiglu": 3, "gelu": 2}[config.mlp] * config.d_ff
    projections = 2 * config.n_heads + 2 * config.kv_heads
    layer = config.d_model * (projections * config.head_dim + widths)
    attention = 12 * config.n_layers * length * config.d_model
    return 6 * (head + config.n_layers * layer) + attention

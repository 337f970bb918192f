"""Small models of every kind, to export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cllm.core.model_config import ModelConfig
from cllm.export.source import Source
from cllm.model.norms import BatchNorm
from cllm.model.transformer import Transformer
from cllm.text.tokenizer import Tokenizer

SHAPE: dict[str, Any] = {
    "d_model": 64,
    "n_layers": 2,
    "n_heads": 4,
    "d_ff": 96,
    "context": 24,
    "norm_eps": 1e-4,
    "rope_theta": 500.0,
}

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied": {"tie_embeddings": False},
    "grouped": {"n_kv_heads": 2},
    "one key head": {"n_kv_heads": 1, "tie_embeddings": False},
    "layernorm": {"norm": "layernorm"},
    "batchnorm": {"norm": "batchnorm"},
    "gelu": {"mlp": "gelu"},
    "learned": {"positions": "learned"},
    "gpt-2": {"norm": "layernorm", "mlp": "gelu", "positions": "learned"},
    "batchnorm gelu untied": {"norm": "batchnorm", "mlp": "gelu", "tie_embeddings": False},
    "reduced": {"embedding": {"kind": "reduced", "rank": 16}},
    "reduced untied": {"embedding": {"kind": "reduced", "rank": 16}, "tie_embeddings": False},
    "composed": {"embedding": {"kind": "composed"}},
    "composed+reduced": {"embedding": {"kind": "composed+reduced", "rank": 16}},
    "snapped": {"embedding": {"lattice": "e8"}},
    "snapped to a basis": {"embedding": {"kind": "reduced", "rank": 8, "lattice": "reduced"}},
}
"""Every setting that changes what a format must hold, alone and together."""

REFUSED = {
    "hf": {"layernorm", "batchnorm", "batchnorm gelu untied", "learned", "gpt-2"},
    "gguf": {"layernorm", "batchnorm", "batchnorm gelu untied", "learned", "gpt-2", "gelu"},
}
"""What a format cannot hold."""


@pytest.fixture(scope="session", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Each kind of model in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def refused() -> dict[str, set[str]]:
    """The kinds that each format refuses."""
    return REFUSED


@pytest.fixture(scope="session")
def tokenizer(text_of: Callable[..., str]) -> Tokenizer:
    """320 tokens."""
    return Tokenizer.train([text_of(60)], 320)


@pytest.fixture(scope="session")
def source_of(
    tokenizer: Tokenizer, text_of: Callable[..., str], incidence_of: Callable[..., Any]
) -> Callable[..., Source]:
    """Makes a model with lively random weights, by the name of a kind, or by settings."""

    def make(kind: str = "plain", **settings: Any) -> Source:
        chosen = SHAPE | {"vocab_size": tokenizer.vocab_size} | KINDS[kind] | settings
        embedding = dict(chosen.pop("embedding", {}))
        if str(embedding.get("kind")).startswith("composed"):
            embedding |= {"pieces": 100, "nonzeros": 3 * tokenizer.vocab_size}
        model = Transformer(ModelConfig(**chosen, embedding=embedding))
        model.start(1)
        if model.config.embedding.is_composed:
            model.set_incidence(incidence_of(tokenizer.vocab_size, 100))
        enliven(model)
        sample = np.asarray(tokenizer.encode(text_of(8)), dtype=np.int64)
        return Source("lively", model.eval(), tokenizer, sample, {"checkpoint": "step-00000001"})

    return make


def enliven(model: Transformer) -> None:
    """Weights so large that a mistake in any of them shows in the logits."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
            elif "norm" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
            elif not name.endswith("basis"):
                parameter.mul_(5)
        for module in model.modules():
            if isinstance(module, BatchNorm):
                width = module.running_mean.shape
                module.running_mean.copy_(torch.randn(width, generator=generator) * 0.2)
                module.running_square.copy_(1 + torch.rand(width, generator=generator))
    for table in model.tables.values():
        table.after_step()


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Transformer]]:
    """Writes a source in a format: (path, the model with the weights as stored)."""

    def make(source: Source, to: str, dtype: str | None = None) -> tuple[Path, Transformer]:
        from cllm.export.formats import FORMATS

        target = FORMATS[to]
        path = tmp_path_factory.mktemp("exported") / f"file{target.suffix}"
        return path, target.load().write(source, dtype or target.dtypes[0], path)

    return make

"""A very small model for the tests of this floor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cllm.core.model_config import ModelConfig
from cllm.model.transformer import Transformer

SMALL = {
    "d_model": 16,
    "n_layers": 2,
    "n_heads": 4,
    "d_ff": 24,
    "context": 8,
    "vocab_size": 19,
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """One thread: what is this small gains nothing from more."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_of() -> Callable[..., Transformer]:
    """Makes a started model of the small shape with fields changed; float64 unless told."""

    def make(
        *,
        attention: str = "matmul",
        seed: int = 3,
        dtype: torch.dtype = torch.float64,
        **fields: Any,
    ) -> Transformer:
        model = Transformer(ModelConfig(**SMALL | fields), attention)
        model.start(seed)
        return model.to(dtype)

    return make


@pytest.fixture(scope="session")
def lively() -> Callable[[Transformer], Transformer]:
    """Replaces all weights by larger random ones, so that no part of the model is next to nothing."""

    def make(model: Transformer) -> Transformer:
        generator = torch.Generator().manual_seed(11)
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.copy_(0.3 * noise + (1.0 if parameter.dim() == 1 else 0.0))
        return model

    return make

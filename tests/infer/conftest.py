"""A very small model for the tests of this floor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cllm.core.errors import UserError
from cllm.core.model_config import ModelConfig
from cllm.infer.loop import compile_library
from cllm.model.transformer import Transformer

SHAPE = {"d_model": 16, "n_layers": 2, "n_heads": 4, "d_ff": 24, "context": 12, "vocab_size": 31}


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache directory that the compiled loop goes into: the others' has none, whatever ran before."""
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def library(isolated: Path, kernels: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The compiled loop, for this test alone; skipped where there is no compiler."""
    monkeypatch.setenv("CLLM_CACHE", str(kernels))
    try:
        return compile_library()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def model_of() -> Callable[..., Transformer]:
    """Makes a float64 model with weights large enough that every token matters."""

    def make(attention: str = "matmul", **fields: Any) -> Transformer:
        torch.set_num_threads(1)
        model = Transformer(ModelConfig(**SHAPE | fields), attention).double()
        generator = torch.Generator().manual_seed(6)
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.copy_(0.4 * noise + (1.0 if parameter.dim() == 1 else 0.0))
        return model

    return make

"""``torchscript``: a traced .pt file, for programs that still load these; torch 2.13 deprecates it."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from cllm.export.fresh import open_fresh
from cllm.export.graph import Whole, graph_model
from cllm.export.marks import MARK
from cllm.export.runtime import Runtime
from cllm.export.source import Source
from cllm.model.transformer import Transformer


def write(source: Source, dtype: str, path: Path) -> Transformer:
    """Write the file; returns the model that it holds."""
    model = graph_model(source.model)
    example = torch.zeros(2, min(3, source.config.context), dtype=torch.long)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # that it is deprecated, and that sizes become tensors
        traced = torch.jit.trace(Whole(model), example, check_trace=False)
        torch.jit.save(traced, str(path), _extra_files={MARK: "1"})
    return model


def open_runtime(path: Path) -> Runtime:
    """The file in a fresh process without cllm."""
    return open_fresh("torchscript", path)

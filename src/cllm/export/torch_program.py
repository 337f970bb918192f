"""``torch-export``: a .pt2 file of ``torch.export``; it is also what ``aoti`` compiles."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch.export import Dim, ExportedProgram

from cllm.export.fresh import open_fresh
from cllm.export.graph import Whole, graph_model
from cllm.export.marks import MARK
from cllm.export.runtime import Runtime
from cllm.export.source import Source
from cllm.model.transformer import Transformer


def write(source: Source, dtype: str, path: Path) -> Transformer:
    """Write the file; returns the model that it holds."""
    model = graph_model(source.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about suffixes and shapes of constants
        torch.export.save(program(Whole(model)), path, extra_files={MARK: "1"})
    return model


def program(module: Whole) -> ExportedProgram:
    """The graph of ids (batch, time) -> logits, for any batch and up to ``context`` tokens."""
    model = module.model
    time = Dim("time", min=1, max=model.config.context)
    shapes = {"input_ids": {0: Dim("batch", min=1), 1: time}}
    length = min(3, model.config.context)
    example = torch.zeros(2, length, dtype=torch.long)
    with torch.no_grad():
        return torch.export.export(module, (example,), dynamic_shapes=shapes)


def open_runtime(path: Path) -> Runtime:
    """The file in a fresh process without cllm."""
    return open_fresh("torch-export", path)

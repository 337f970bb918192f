"""``aoti``: a .pt2 package that AOTInductor compiled for this kind of processor."""

from __future__ import annotations

import warnings
from pathlib import Path

from cllm.core.errors import UserError
from cllm.core.machine import cannot_compile
from cllm.export.fresh import open_fresh
from cllm.export.graph import graph_model
from cllm.export.runtime import Runtime
from cllm.export.source import Source
from cllm.export.torch_program import program
from cllm.model.transformer import Transformer


def write(source: Source, dtype: str, path: Path) -> Transformer:
    """Write the file; returns the model that it holds. ``UserError`` without a C++ compiler."""
    reason = cannot_compile()
    if reason:
        raise UserError(f"aoti needs a C++ compiler: {reason}; export to torch-export")
    import torch._inductor

    model = graph_model(source.model)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch._inductor.aoti_compile_and_package(program(model), package_path=str(path))
    return model


def open_runtime(path: Path) -> Runtime:
    """The file in a fresh process without cllm."""
    return open_fresh("aoti", path)

"""``aoti``: a .pt2 package that AOTInductor compiled for this kind of processor."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from cllm.core.errors import UserError
from cllm.core.machine import cannot_compile
from cllm.export.fresh import open_fresh
from cllm.export.graph import Whole, graph_model
from cllm.export.marks import MARK
from cllm.export.runtime import Runtime
from cllm.export.source import Source
from cllm.export.torch_program import program
from cllm.model.transformer import Transformer


class Bounded(Whole):
    """``Whole`` that refuses more tokens than the model's context, when it is compiled, too.

    AOTInductor takes the largest length that a graph was exported with for granted and drops what
    compares the length of ids with it. A length that was counted from their values it cannot foresee.
    """

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits of whole texts."""
        length = cast(int, ((input_ids[0] >= 0) | (input_ids[0] < 0)).sum().item())
        torch._check(length <= self.model.config.context)
        return super().forward(input_ids)


def write(source: Source, dtype: str, path: Path) -> Transformer:
    """Write the file; returns the model that it holds. ``UserError`` without a C++ compiler."""
    reason = cannot_compile()
    if reason:
        raise UserError(f"aoti needs a C++ compiler: {reason}; export to torch-export")
    import torch._inductor

    model = graph_model(source.model)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch._inductor.aoti_compile_and_package(
            program(Bounded(model)),
            package_path=str(path),
            inductor_configs={"aot_inductor.metadata": {MARK: "1"}},
        )
    return model


def open_runtime(path: Path) -> Runtime:
    """The file in a fresh process without cllm."""
    return open_fresh("aoti", path)

"""Every norm with every feed-forward part, kind of position and table: held or refused, by format."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from cllm.core.errors import UserError
from cllm.export.check import batches, check
from cllm.export.graph import Whole, graph_model
from cllm.export.source import Source

SourceOf = Callable[..., Source]
Exported = Callable[..., tuple[Path, Any]]

TABLES: dict[str, dict[str, Any]] = {
    "dense": {},
    "reduced": {"kind": "reduced", "rank": 16},
    "composed": {"kind": "composed"},
    "composed+reduced": {"kind": "composed+reduced", "rank": 16},
    "snapped": {"lattice": "e8"},
}
COMBINATIONS = list(
    product(("rmsnorm", "layernorm", "batchnorm"), ("swiglu", "gelu"), ("rope", "learned"), TABLES)
)
LLAMA = {"hf": ("swiglu", "gelu"), "gguf": ("swiglu",)}
"""The feed-forward parts that each Llama holds; beside them RMS norm and turned positions alone."""


def made(source_of: SourceOf, norm: str, mlp: str, positions: str, table: str) -> Source:
    """A model of one layer."""
    chosen = {"norm": norm, "mlp": mlp, "positions": positions, "embedding": TABLES[table]}
    return source_of(n_layers=1, **chosen)


@pytest.mark.parametrize("combination", COMBINATIONS, ids="-".join)
def test_the_graph_of_onnx_and_torch_files_holds_it(
    combination: tuple[str, str, str, str], source_of: SourceOf
) -> None:
    source = made(source_of, *combination)
    graph = Whole(graph_model(source.model))
    with torch.no_grad():
        for ids in map(torch.from_numpy, batches(source, 3)):
            torch.testing.assert_close(graph(ids), source.model(ids), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("combination", COMBINATIONS, ids="-".join)
@pytest.mark.parametrize("to", LLAMA)
def test_a_llama_holds_it_exactly_or_refuses_it(
    to: str, combination: tuple[str, str, str, str], source_of: SourceOf, exported: Exported
) -> None:
    pytest.importorskip({"hf": "transformers", "gguf": "gguf"}[to])
    source = made(source_of, *combination)
    norm, mlp, positions, _ = combination
    if norm != "rmsnorm" or positions != "rope" or mlp not in LLAMA[to]:
        with pytest.raises(UserError, match=rf"{to} .*cannot hold model\..*: .*export"):
            exported(source, to)
        return
    path, _ = exported(source, to)
    if to == "gguf":
        from cllm.export.gguf_reading import read_back as opened
    else:
        from cllm.export.hf import open_runtime as opened
    assert check(opened(path), source.model, source, shapes=3).difference <= 1e-4

"""Compressed files as sources: llama.cpp's blocks go over byte for byte, the rest by its values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cllm
from cllm.compress.command import compress_run
from cllm.compress.formats import read_state
from cllm.compress.settings import Settings
from cllm.core.errors import UserError
from cllm.export.export import export
from cllm.export.gguf import tensors
from cllm.export.verify import verify
from cllm.store.container import Container
from cllm.training.progress import Silent

gguf = pytest.importorskip("gguf")

QUICK: dict[str, Any] = {"tokens": 256, "beams": 2, "table": "fp16", "scales": "range", "sweeps": 0}


@pytest.fixture(scope="module", params=["gguf-q4_0", "gguf-q8_0"])
def compressed(
    request: pytest.FixtureRequest, trained: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A file whose matrices are llama.cpp's blocks."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("blocks") / "notes.cllm"
    bits = 4 if request.param == "gguf-q4_0" else 8
    settings = Settings(**QUICK, grid=request.param, bits=bits)
    compress_run(trained, settings, Silent(), out=out)
    return out


def test_blocks_are_the_files_own_bytes_and_llama_cpp_runs_them(
    compressed: Path, isolated: Path, corpus: Path
) -> None:
    lines: list[str] = []
    made = export(compressed, "gguf", out=isolated / "notes.gguf", say=lines.append)
    container = Container.open(compressed)
    kind = container.header.weights["layers.0.attention.qkv.weight"].kind.removeprefix("gguf-")
    assert made.dtype == kind
    assert any(f"in blocks of {kind} and go over byte for byte" in line for line in lines)
    assert made.checked is not None
    if made.checked.runtime.startswith("llama.cpp"):
        assert made.checked.divergence < 0.01
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(made.path).tensors}
    state, compared = read_state(container), 0
    for theirs, ours, rows in tensors(cllm.load(compressed).config.model):
        if not container.header.weights[ours].kind.startswith("gguf-"):
            continue
        data, values = container.tensor(ours).numpy(), state[ours].numpy()
        if rows is not None:
            data, values = data[rows], values[rows]
        assert np.array_equal(np.asarray(stored[theirs].data), data)
        decoded = gguf.quants.dequantize(stored[theirs].data, stored[theirs].tensor_type)
        assert np.array_equal(decoded, values)
        compared += 1
    assert compared == 7 * cllm.load(compressed).config.model.n_layers
    found = verify(made.path, compressed, data=[str(corpus)])
    assert found.holds


def test_tables_keep_their_precision_where_it_is_asked_for(
    compressed: Path, isolated: Path
) -> None:
    made = export(compressed, "gguf", out=isolated / "wide.gguf", dtype="f32", checking=False)
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(made.path).tensors}
    assert kinds["token_embd.weight"] == "F32"
    assert kinds["blk.0.ffn_down.weight"] in ("Q4_0", "Q8_0")


def test_a_compressed_file_goes_beside_itself_and_has_no_text(
    compressed: Path, isolated: Path, cllm: Callable[..., Any]
) -> None:
    place = isolated / "notes.cllm"
    place.write_bytes(compressed.read_bytes())
    result = cllm("export", place, "--to", "torch-export", "--no-check")
    assert result.code == 0, result.err
    assert (isolated / "notes.pt2").is_file()
    with pytest.raises(UserError, match="has no text of its own: name one with --data"):
        verify(isolated / "notes.pt2", place)

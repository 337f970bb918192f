"""``onnx``: both graphs in ONNX Runtime, in float32 and with weights in integers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm.core.errors import UserError
from cllm.export.check import CheckFailedError, check
from cllm.export.onnx import LIMIT, open_runtime
from cllm.export.onnx_blocks import blob
from cllm.export.rounding import BLOCK, Rounded, round_blocks
from cllm.export.source import Source

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

SourceOf = Callable[..., Source]
Exported = Callable[..., tuple[Path, Any]]
QUICK = "batchnorm gelu untied"
"""A kind that has most of what graphs differ in; the others are slow proofs."""


def holds(source: Source, exported: Exported, dtype: str) -> Path:
    """Export, and check over shapes that hold one token, one window, and a full context."""
    path, model = exported(source, "onnx", dtype)
    runtime = open_runtime(path)
    assert runtime.stepwise is not None
    found = check(runtime, model, source, shapes=12)
    assert found.difference <= 1e-4
    return path


@pytest.fixture(scope="module")
def lively(source_of: SourceOf, exported: Exported) -> tuple[Source, Path, Any]:
    """(source, its export in float32, the model as stored), once: exporting takes seconds."""
    source = source_of(QUICK, n_layers=1, n_kv_heads=2)
    return source, *exported(source, "onnx", "fp32")


def test_both_graphs_give_the_models_logits(lively: tuple[Source, Path, Any]) -> None:
    source, path, _ = lively
    runtime = open_runtime(path)
    assert runtime.stepwise is not None
    assert check(runtime, source.model, source, shapes=12).difference <= 1e-4
    names = {file.name for file in path.iterdir()}
    assert names == {"model.onnx", "model-cached.onnx", "tokenizer.json"}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "int8", "int4"])
def test_each_kind_of_model_is_held(
    kind: str, dtype: str, source_of: SourceOf, exported: Exported
) -> None:
    source = source_of(kind, n_layers=1)
    if dtype != "fp32" and source.config.embedding.is_reduced:
        with pytest.raises(UserError, match="blocks of 32"):
            exported(source, "onnx", dtype)
        return
    holds(source, exported, dtype)


@pytest.mark.parametrize("dtype", ["int4", pytest.param("int8", marks=pytest.mark.slow)])
def test_integers_are_what_the_file_holds(
    dtype: str, source_of: SourceOf, exported: Exported
) -> None:
    source = source_of("grouped", n_layers=1)
    path = holds(source, exported, dtype)
    with pytest.raises(CheckFailedError):
        check(open_runtime(path), source.model, source)
    for name in ("model.onnx", "model-cached.onnx"):
        graph = onnx.load(path / name).graph
        products = [node for node in graph.node if node.op_type == "MatMulNBits"]
        assert len(products) == 5  # qkv, out, gate and up, down, and the scores
        floats = [
            item
            for item in graph.initializer
            if item.data_type == onnx.TensorProto.FLOAT
            and not item.name.endswith((".scales", "cos", "sin"))
        ]
        assert max(len(item.dims) for item in floats) <= 1  # norms alone
        tables = [item for item in graph.initializer if item.dims[:1] == [source.config.vocab_size]]
        assert len(tables) == 2  # one table's integers and scales, for both look-up and scores


def test_a_wrong_weight_in_either_graph_fails_the_check(
    lively: tuple[Source, Path, Any], tmp_path: Path
) -> None:
    source, whole, model = lively
    for number, name in enumerate(("model.onnx", "model-cached.onnx")):
        path = shutil.copytree(whole, tmp_path / str(number))
        graph = onnx.load(path / name)
        items = graph.graph.initializer
        item = next(item for item in items if list(item.dims) == [source.config.d_model])
        values = onnx.numpy_helper.to_array(item) * 1.1
        item.CopyFrom(onnx.numpy_helper.from_array(values, item.name))
        onnx.save(graph, path / name)
        with pytest.raises(CheckFailedError, match="logits differ"):
            check(open_runtime(path), model, source)
        (path / name).write_bytes((path / name).read_bytes()[:-2000])
        with pytest.raises(UserError, match=rf"onnxruntime cannot load .*{name}"):
            open_runtime(path)


def test_the_tokenizer_beside_the_graphs_is_checked(
    lively: tuple[Source, Path, Any], tmp_path: Path
) -> None:
    source, whole, model = lively
    path = shutil.copytree(whole, tmp_path / "x")
    assert check(open_runtime(path), model, source, shapes=2).texts > 0
    file = path / "tokenizer.json"
    description = json.loads(file.read_text(encoding="utf-8"))
    del description["model"]["merges"][3]
    file.write_text(json.dumps(description), encoding="utf-8")
    with pytest.raises(CheckFailedError, match="the tokens of"):
        check(open_runtime(path), model, source, shapes=2)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"tokenizer.json is no tokenizer: it was cut short"):
        open_runtime(path)
    file.unlink()
    with pytest.raises(UserError, match=r"cannot read .*tokenizer.json"):
        open_runtime(path)


def test_what_one_file_cannot_hold_is_refused(
    source_of: SourceOf, exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert LIMIT < 2**31
    monkeypatch.setattr("cllm.export.onnx.LIMIT", 1000)
    with pytest.raises(UserError, match="one ONNX file holds less than 2"):
        exported(source_of(), "onnx")


def test_widths_that_blocks_do_not_divide_are_refused(
    source_of: SourceOf, exported: Exported
) -> None:
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.out\.weight have 100 numbers; use fp32"):
        exported(source_of(d_ff=100), "onnx", "int8")


@given(st.integers(0, 2**32 - 1), st.sampled_from([4, 8]), st.floats(1e-6, 1e6))
def test_rounding_is_within_half_a_step(seed: int, bits: int, size: float) -> None:
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal((3, 2 * BLOCK)) * size).astype(np.float32)
    values[1, :BLOCK] = 0
    rounded = round_blocks(values, bits)
    step = np.repeat(np.abs(rounded.scales), BLOCK, axis=1)
    # Four bits reach from −8 to 7: at the end that the largest number is not at, a step is lost.
    allowed = np.where(bits == 8, 0.5, 1.0) * step
    assert (np.abs(rounded.values() - values) <= allowed * (1 + 1e-5)).all()
    assert rounded.integers.min() >= -(2 ** (bits - 1))
    largest = np.abs(values.reshape(3, 2, BLOCK)).max(-1)
    kept = np.abs(rounded.values().reshape(3, 2, BLOCK)).max(-1)
    np.testing.assert_allclose(kept, largest, rtol=1e-6)


def test_blob_is_moved_and_packed_low_half_first() -> None:
    integers = np.arange(-8, 24, dtype=np.int8).reshape(1, 32)
    scales = np.ones((1, 1), np.float32)
    assert blob(Rounded(8, integers, scales))[0, 0, :3].tolist() == [120, 121, 122]
    four = Rounded(4, (np.arange(32, dtype=np.int8) % 16 - 8).reshape(1, 32), scales)
    assert blob(four)[0, 0, :3].tolist() == [0x10, 0x32, 0x54]


def test_metadata_names_context_and_end_token(source_of: SourceOf) -> None:
    from cllm.export import onnx as module

    source = source_of()
    proto = onnx.ModelProto()
    module._describe(proto, source)
    facts = {item.key: item.value for item in proto.metadata_props}
    assert facts == {
        "cllm.context": str(source.config.context),
        "cllm.end_id": str(source.tokenizer.end_id),
    }

"""``onnx``: a directory with two graphs for ONNX Runtime, of whole texts and with a cache.

``model.onnx`` takes ``input_ids`` (batch, time) and gives ``logits``; ``model-cached.onnx`` takes and
gives keys and values, too (``past.0.key``, …, each (batch, heads, past, width); none yet: past is 0).
Each is a single file.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import tokenizers
import torch
from torch import nn

from cllm.core.atomic import clear_errors
from cllm.core.errors import UserError, require
from cllm.export.graph import Cached, Whole, cache_names, graph_model
from cllm.export.hf import tokenizer_json
from cllm.export.marks import PRODUCER
from cllm.export.onnx_blocks import Packed, key, pack
from cllm.export.rounding import BLOCK, round_blocks
from cllm.export.runtime import Runtime
from cllm.export.source import Source
from cllm.model.embedding import Embedding
from cllm.model.transformer import Transformer

BITS = {"fp32": 0, "int8": 8, "int4": 4}
OPSET = 20
LIMIT = 2**31 - 2**20
"""Bytes of one file: protobuf's limit, with room for the graph."""
WHOLE, CACHED, TOKENIZER = "model.onnx", "model-cached.onnx", "tokenizer.json"


def write(source: Source, dtype: str, path: Path) -> Transformer:
    """Fill the directory ``path``; returns the model with the weights as they are stored.

    Raises ``UserError`` without the package onnxscript, for a model whose file would be above 2 GB, and
    for rows that blocks do not divide.
    """
    onnx = require("onnx", "onnx", "exporting to onnx")
    require("onnxscript", "onnx", "exporting to onnx")
    model = graph_model(source.model)
    packed = round_weights(model, BITS[dtype]) if BITS[dtype] else {}
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    if size > LIMIT:
        raise UserError(
            f"the graph would have {size / 2**30:.1f} GB, and one ONNX file holds less than 2; "
            "export to torch-export or gguf"
        )
    path.mkdir()
    for name, graph in ((WHOLE, whole_graph(model)), (CACHED, cached_graph(model))):
        if packed:
            pack(graph, onnx, packed)
        _describe(graph, source)
        onnx.checker.check_model(graph)
        (path / name).write_bytes(graph.SerializeToString())
    words = json.dumps(tokenizer_json(source.tokenizer), indent=2, ensure_ascii=False)
    (path / TOKENIZER).write_text(words + "\n", encoding="utf-8")
    return model


def round_weights(model: Transformer, bits: int) -> Packed:
    """Round matrices to ``bits`` and token tables to 8, in place, and say to what.

    The basis of a reduced table stays float32. Raises ``UserError`` for rows that are not whole blocks.
    """
    packed: Packed = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | Embedding):
            continue
        values = module.weight.detach().numpy()
        if values.shape[1] % BLOCK:
            raise UserError(
                f"onnx stores integers in blocks of {BLOCK}, and rows of {name}.weight have "
                f"{values.shape[1]} numbers; use fp32"
            )
        rounded = round_blocks(values, bits if isinstance(module, nn.Linear) else 8)
        module.weight.data = torch.from_numpy(rounded.values())
        packed[key(rounded.values())] = rounded
    for table in model.tables.values():
        table.after_step()
    return packed


def whole_graph(model: Transformer) -> Any:
    """The ONNX model of ids (batch, time) -> logits (batch, time, vocabulary)."""
    free = torch.export.Dim.DYNAMIC
    return _export(
        Whole(model),
        (torch.zeros(2, 3, dtype=torch.long),),
        {"input_ids": {0: free, 1: free}},
        ["input_ids"],
        ["logits"],
    )


def cached_graph(model: Transformer) -> Any:
    """The same with keys and values in and out."""
    free, config = torch.export.Dim.DYNAMIC, model.config
    past = [torch.zeros(2, config.kv_heads, 2, config.head_dim) for _ in range(2 * config.n_layers)]
    return _export(
        Cached(model),
        (torch.zeros(2, 3, dtype=torch.long), past),
        {"input_ids": {0: free, 1: free}, "past": [{0: free, 2: free} for _ in past]},
        ["input_ids", *cache_names(config.n_layers, "past")],
        ["logits", *cache_names(config.n_layers, "present")],
    )


def _export(
    module: nn.Module,
    example: tuple[Any, ...],
    shapes: dict[str, Any],
    inputs: list[str],
    outputs: list[str],
) -> Any:
    with _quiet():
        program = torch.onnx.export(
            module,
            example,
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=inputs,
            output_names=outputs,
            opset_version=OPSET,
            external_data=False,
            verbose=False,
        )
    assert program is not None
    return program.model_proto


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on packages that it does not need."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def _describe(graph: Any, source: Source) -> None:
    graph.producer_name, graph.doc_string = PRODUCER, source.name
    facts = {"context": source.config.context, "end_id": source.tokenizer.end_id}
    for name, value in facts.items():
        graph.metadata_props.add(key=f"cllm.{name}", value=str(value))


def open_runtime(path: Path) -> Runtime:
    """Both graphs in ONNX Runtime on the CPU. Raises ``UserError`` where it refuses."""
    ort = require("onnxruntime", "onnx", "checking an onnx export")
    whole, cached = _session(ort, path / WHOLE), _session(ort, path / CACHED)
    layout = {item.name: item for item in cached.get_inputs() if item.name != "input_ids"}

    def logits(ids_bt: np.ndarray) -> np.ndarray:
        return np.asarray(whole.run(["logits"], {"input_ids": ids_bt})[0])

    def stepwise(pieces: list[np.ndarray]) -> list[np.ndarray]:
        batch = len(pieces[0])
        shapes = ((name, item.shape) for name, item in layout.items())
        past = {n: np.zeros((batch, s[1], 0, s[3]), np.float32) for n, s in shapes}
        made = []
        for ids in pieces:
            scores, *present = cached.run(None, {"input_ids": np.ascontiguousarray(ids)} | past)
            past = dict(zip(layout, present, strict=True))
            made.append(scores)
        return made

    name = f"onnxruntime {ort.__version__}"
    return Runtime(name, logits, _encoder(path / TOKENIZER), stepwise=stepwise)


def _encoder(path: Path) -> Callable[[str], list[int]]:
    """The tokenizer that lies beside the graphs, in Hugging Face's library."""
    with clear_errors(path, "read"):
        text = path.read_bytes()
    try:
        backend = tokenizers.Tokenizer.from_buffer(text)
    except Exception as error:  # the library raises nothing more specific
        raise UserError(
            f"{path} is no tokenizer: it was cut short or altered; export anew"
        ) from error
    backend.encode_special_tokens = True  # text that looks like a special token stays text

    def encode(text: str) -> list[int]:
        return list(backend.encode(text).ids)

    return encode


def _session(ort: ModuleType, path: Path) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1  # its threads spin for one another; a check needs no speed
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has many of its own
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"onnxruntime cannot load {path}: {reason}") from error

"""``gguf``: one file for llama.cpp and what is built on it, by the package ``gguf``.

llama.cpp's Llama turns neighbouring pairs of a head's numbers where ours turns i and i + K/2 (Su et al.
2021 leave the order open); rows of queries and keys are put in its order, which changes no score.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from cllm.core.model_config import ModelConfig
from cllm.export.gguf_blocks import Stored, gguf_package, store
from cllm.export.gguf_tokenizer import vocabulary
from cllm.export.llama import refuse
from cllm.export.marks import MARK
from cllm.export.runtime import Runtime
from cllm.export.source import Source, plain
from cllm.model.transformer import Transformer

KINDS = {
    "f32": ("F32", "F32", "ALL_F32"),
    "f16": ("F16", "F16", "MOSTLY_F16"),
    "bf16": ("BF16", "BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "Q8_0", "MOSTLY_Q8_0"),
    "q4_0": ("Q4_0", "Q8_0", "MOSTLY_Q4_0"),
}
"""For each dtype, how matrices and token tables are stored, and the file's type. Norms are F32. Token
tables keep 8 bits beside 4-bit matrices: llama.cpp's quantizer, too, gives the output more bits."""


def write(source: Source, dtype: str, path: Path) -> Transformer:
    """Write the file; returns the model with the weights as they are stored.

    Weights that a compressed file has in llama.cpp's blocks are stored as those very bytes.
    """
    chosen = {name: Stored(kind.upper(), data) for name, (kind, data) in source.blocks.items()}
    return write_blocks(source, dtype, path, chosen)


def write_blocks(
    source: Source, dtype: str, path: Path, chosen: Mapping[str, Stored]
) -> Transformer:
    """The same with some weights rounded by someone else.

    ``chosen``: by parameter name of the model (``layers.0.attention.qkv.weight``), rows as in the model;
    what is not in it is rounded to ``dtype`` as ggml's reference does. Returns the model with the weights
    as stored. Raises ``UserError`` where llama.cpp's Llama cannot hold the model or its tokenizer, and
    ``ValueError`` for a chosen weight of another shape.
    """
    refuse(source.config, "gguf (llama.cpp)", gelu=False)
    model = copy.deepcopy(plain(source.model))
    stored = store_weights(model, dtype, chosen)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(stored[name].values()))
    _write_file(source, dtype, path, stored)
    return model


def store_weights(
    model: Transformer, dtype: str, chosen: Mapping[str, Stored]
) -> dict[str, Stored]:
    """Each parameter as it is stored, ``chosen`` ones as they come."""
    matrices, tables, _ = KINDS[dtype]
    stored = {}
    unknown = sorted(set(chosen) - {name for name, _ in model.named_parameters()})
    if unknown:
        raise ValueError(f"the model has no weight {unknown[0]!r}")
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy()
        if name not in chosen:
            kind = tables if name.split(".")[0] in ("embedding", "head") else matrices
            stored[name] = store(values, kind if values.ndim > 1 else "F32", name)
            continue
        if chosen[name].values().shape != values.shape:
            raise ValueError(f"{name} has shape {values.shape}, not {chosen[name].values().shape}")
        stored[name] = chosen[name]
    return stored


def file_type(dtype: str, stored: Mapping[str, Stored]) -> str:
    """The name of the file's type: by its matrices in blocks, if someone chose such, else ``dtype``'s."""
    kinds = {weight.kind for name, weight in stored.items() if name.startswith("layers.")}
    blocks = [kind for kind in ("Q4_0", "Q8_0") if kind in kinds]
    return KINDS[blocks[0].lower() if blocks else dtype][2]


def tensors(config: ModelConfig) -> Iterator[tuple[str, str, np.ndarray | None]]:
    """(name in the file, name in the model, the rows it takes); none takes the whole weight."""
    yield "token_embd.weight", "embedding.weight", None
    heads, kv_heads, width = config.n_heads, config.kv_heads, config.head_dim
    q, k, v = np.split(
        np.arange((heads + 2 * kv_heads) * width), [heads * width, (heads + kv_heads) * width]
    )
    for number in range(config.n_layers):
        ours, theirs = f"layers.{number}", f"blk.{number}"
        yield f"{theirs}.attn_norm.weight", f"{ours}.attention_norm.weight", None
        for name, rows in (("q", neighbours(q, width)), ("k", neighbours(k, width)), ("v", v)):
            yield f"{theirs}.attn_{name}.weight", f"{ours}.attention.qkv.weight", rows
        yield f"{theirs}.attn_output.weight", f"{ours}.attention.out.weight", None
        yield f"{theirs}.ffn_norm.weight", f"{ours}.mlp_norm.weight", None
        gate, up = np.split(np.arange(2 * config.d_ff), 2)
        yield f"{theirs}.ffn_gate.weight", f"{ours}.mlp.gate_up.weight", gate
        yield f"{theirs}.ffn_up.weight", f"{ours}.mlp.gate_up.weight", up
        yield f"{theirs}.ffn_down.weight", f"{ours}.mlp.out.weight", None
    yield "output_norm.weight", "norm.weight", None
    if not config.tie_embeddings:
        yield "output.weight", "head.weight", None


def neighbours(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of heads whose pairs are (i, i + K/2) in the order in which pairs are neighbours."""
    return rows.reshape(-1, 2, head_dim // 2).swapaxes(1, 2).reshape(-1)


def _write_file(source: Source, dtype: str, path: Path, stored: dict[str, Stored]) -> None:
    gguf, config = gguf_package(), source.config
    assert config.vocab_size is not None
    words = vocabulary(source.tokenizer, config.vocab_size)
    file = gguf.GGUFWriter(path, "llama")
    file.add_string(MARK, "1")
    file.add_name(source.name)
    file.add_file_type(gguf.LlamaFileType[file_type(dtype, stored)])
    file.add_quantization_version(gguf.GGML_QUANT_VERSION)
    file.add_vocab_size(config.vocab_size)
    file.add_context_length(config.context)
    file.add_embedding_length(config.d_model)
    file.add_block_count(config.n_layers)
    file.add_feed_forward_length(config.d_ff)
    file.add_head_count(config.n_heads)
    file.add_head_count_kv(config.kv_heads)
    file.add_layer_norm_rms_eps(config.norm_eps)
    file.add_rope_dimension_count(config.head_dim)
    file.add_rope_freq_base(config.rope_theta)
    file.add_tokenizer_model("gpt2")  # byte-level BPE; how it cuts text is `pre`
    file.add_tokenizer_pre(words.pre)
    file.add_token_list(words.tokens)
    file.add_token_types(words.types)
    file.add_token_merges(words.merges)
    file.add_bos_token_id(words.end_id)
    file.add_eos_token_id(words.end_id)
    file.add_add_bos_token(True)  # a text begins after an end token, as in training
    file.add_add_eos_token(False)
    for theirs, ours, rows in tensors(config):
        weight = stored[ours] if rows is None else stored[ours].rows(rows)
        file.add_tensor(theirs, weight.data, raw_dtype=gguf.GGMLQuantizationType[weight.kind])
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def open_runtime(path: Path) -> Runtime:
    """The file in llama.cpp, or read back by the ``gguf`` package where llama-cpp-python is missing or
    ends by an illegal instruction."""
    from cllm.export.gguf_reading import read_back
    from cllm.export.llama_cpp import IllegalInstructionError, open_llama_cpp

    try:
        return open_llama_cpp(path)
    except ModuleNotFoundError:
        return read_back(path)
    except IllegalInstructionError as error:
        return read_back(path, str(error))

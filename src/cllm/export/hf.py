"""``hf``: a directory that transformers' ``AutoModelForCausalLM`` and ``AutoTokenizer`` load unchanged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from cllm.core.errors import UserError, require
from cllm.export.llama import Llama, as_llama, refuse
from cllm.export.marks import MARK
from cllm.export.model_card import model_card
from cllm.export.runtime import Runtime
from cllm.export.source import Source, plain, rounded
from cllm.model.transformer import Transformer
from cllm.text.tokenizer import Tokenizer

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def write(source: Source, dtype: str, path: Path) -> Transformer:
    """Fill the directory ``path``; returns the model with the weights as they are stored.

    Raises ``UserError`` where a Llama cannot hold the model.
    """
    refuse(source.config, "hf (LlamaForCausalLM)", gelu=True)
    torch_dtype: torch.dtype = getattr(torch, DTYPES[dtype])
    model = rounded(plain(source.model), torch_dtype)
    llama = as_llama(model)
    tensors = {name: tensor.to(torch_dtype).contiguous() for name, tensor in llama.tensors.items()}
    path.mkdir()
    # `clone`: gate and up, q, k and v are views of one weight, which safetensors refuses.
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt", MARK: "1"})
    (path / "model.safetensors").chmod(0o644)  # it writes for the owner alone
    end = source.tokenizer.end_id
    _json(path / "config.json", config_json(llama, end, DTYPES[dtype]))
    _json(path / "generation_config.json", generation_json(end))
    _json(path / "tokenizer_config.json", tokenizer_config(source.tokenizer, source.config.context))
    _json(path / "tokenizer.json", tokenizer_json(source.tokenizer))
    (path / "README.md").write_text(model_card(source, dtype, tensors), encoding="utf-8")
    return model


def config_json(llama: Llama, end_id: int, dtype: str) -> dict[str, Any]:
    """``config.json``; positions and precision by the names of transformers 5 and of 4."""
    config = llama.config
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu" if llama.gated else "gelu_pytorch_tanh",
        "attention_bias": False,
        "mlp_bias": not llama.gated,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": end_id,
        "eos_token_id": end_id,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def generation_json(end_id: int) -> dict[str, Any]:
    """``generation_config.json``: the defaults of ``cllm generate``."""
    return {
        "bos_token_id": end_id,
        "eos_token_id": end_id,
        "pad_token_id": end_id,
        "do_sample": True,
        "temperature": 0.8,
        "top_k": 50,
        "top_p": 1.0,
        "max_new_tokens": 200,
    }


def tokenizer_config(tokenizer: Tokenizer, context: int) -> dict[str, Any]:
    """``tokenizer_config.json``. Text that looks like a special token stays text, as in training."""
    end = tokenizer.token_name(tokenizer.end_id)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "pad_token": end,
        "model_max_length": context,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
    }


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """``tokenizer.json`` that begins each text with the end token, as texts began in training."""
    description: dict[str, Any] = json.loads(tokenizer.to_json())
    end = tokenizer.token_name(tokenizer.end_id)
    special = {"SpecialToken": {"id": end, "type_id": 0}}
    description["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [special, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [
            special,
            {"Sequence": {"id": "A", "type_id": 0}},
            special,
            {"Sequence": {"id": "B", "type_id": 0}},
        ],
        "special_tokens": {end: {"id": end, "ids": [tokenizer.end_id], "tokens": [end]}},
    }
    return description


def open_runtime(path: Path) -> Runtime:
    """The directory in transformers, its weights as stored and the arithmetic in float32."""
    transformers = require("transformers", "hf", "checking an hf export")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, torch_dtype=torch.float32, local_files_only=True
        ).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # safetensors, JSON and transformers itself have errors of their own
        raise UserError(f"transformers cannot load {path}: {_line(error)}") from error

    def logits(ids_bt: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            made: np.ndarray = model(torch.from_numpy(ids_bt)).logits.float().numpy()
        return made

    def encode(text: str) -> list[int]:
        return list(tokenizer(text)["input_ids"])

    return Runtime(f"transformers {transformers.__version__}", logits, encode)


def _json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__

"""A GGUF file of a Llama read back and computed without llama.cpp, by its conventions.

It stands in for llama.cpp where that is not installed, and shares no line with the writer: names,
pairs of rotary positions, blocks and tokenizer are taken from the file alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from tokenizers import models, pre_tokenizers
from torch import Tensor
from torch.nn import functional

from cllm.core.errors import UserError
from cllm.export.gguf_blocks import gguf_package
from cllm.export.runtime import Runtime


class ForeignError(Exception):
    """A whole GGUF file, but of something that cllm does not export."""


def broken(path: Path) -> str:
    """What to tell of a file that the package ``gguf`` cannot read."""
    return f"{path} is no whole GGUF file of a Llama: it was cut short or altered; export anew"


def read_back(
    path: Path, why: str = "not in llama.cpp, which pip install 'cllm[llama]' builds"
) -> Runtime:
    """The file at ``path``; ``why`` not in llama.cpp. Raises ``UserError`` if it is no whole GGUF file of a
    Llama."""
    gguf = gguf_package()
    try:
        reader = gguf.GGUFReader(path)
        facts = {name: field.contents() for name, field in reader.fields.items()}
        weights = {
            tensor.name: torch.from_numpy(
                np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
            )
            for tensor in reader.tensors
        }
        encode = _Words(facts)
        llama = _Llama(facts, weights)
    except ForeignError as error:
        raise UserError(f"{path} is no GGUF file that cllm exports: {error}") from error
    except Exception as error:  # numpy's and struct's, which tell of reshaping and offsets
        raise UserError(broken(path)) from error
    name = f"the gguf package {_version()} ({why})"
    return Runtime(name, llama.logits, encode.ids)


class _Words:
    """The tokenizer by what the file says, with Hugging Face's library."""

    def __init__(self, facts: dict[str, Any]) -> None:
        tokens, types = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
        if facts["tokenizer.ggml.pre"] != "gpt-2" or facts["tokenizer.ggml.model"] != "gpt2":
            raise ForeignError(f"unknown tokenizer {facts['tokenizer.ggml.pre']!r}")
        merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
        normal = {token: i for i, token in enumerate(tokens) if types[i] == 1}
        self.backend = tokenizers.Tokenizer(models.BPE(vocab=normal, merges=merges))
        self.backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.first = [facts["tokenizer.ggml.bos_token_id"]]
        if not facts["tokenizer.ggml.add_bos_token"]:
            self.first = []
        if 4 in types:
            raise ForeignError("its added tokens cannot be read back")

    def ids(self, text: str) -> list[int]:
        return self.first + list(self.backend.encode(text, add_special_tokens=False).ids)


class _Llama:
    """llama.cpp's graph of the architecture ``llama``, in float32."""

    def __init__(self, facts: dict[str, Any], weights: dict[str, Tensor]) -> None:
        if facts["general.architecture"] != "llama":
            raise ForeignError(f"its architecture is {facts['general.architecture']}")
        self.weights = weights
        self.layers = facts["llama.block_count"]
        self.heads = facts["llama.attention.head_count"]
        self.kv_heads = facts["llama.attention.head_count_kv"]
        self.eps = facts["llama.attention.layer_norm_rms_epsilon"]
        self.turned = facts["llama.rope.dimension_count"]
        self.base = facts["llama.rope.freq_base"]
        if weights["token_embd.weight"].shape[0] != len(facts["tokenizer.ggml.tokens"]):
            raise ForeignError("the table and the vocabulary have different sizes")

    def logits(self, ids_bt: np.ndarray) -> np.ndarray:
        x = self.weights["token_embd.weight"][torch.from_numpy(ids_bt)]
        for number in range(self.layers):
            x = x + self._attention(self._norm(x, f"blk.{number}.attn_norm"), f"blk.{number}.attn")
            h = self._norm(x, f"blk.{number}.ffn_norm")
            gate = functional.silu(self._times(h, f"blk.{number}.ffn_gate"))
            h = gate * self._times(h, f"blk.{number}.ffn_up")
            x = x + self._times(h, f"blk.{number}.ffn_down")
        x = self._norm(x, "output_norm")
        table = "output" if "output.weight" in self.weights else "token_embd"
        return np.asarray(self._times(x, table).numpy())

    def _times(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return functional.rms_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.eps)

    def _attention(self, x: Tensor, name: str) -> Tensor:
        batch, length, _ = x.shape
        parts = []
        for part, heads in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads)):
            made = self._times(x, f"{name}_{part}").view(batch, length, heads, -1).transpose(1, 2)
            parts.append(self._turn(made) if part != "v" else made)
        q, k, v = parts
        grouped = self.heads != self.kv_heads
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return self._times(mixed.transpose(1, 2).flatten(2), f"{name}_output")

    def _turn(self, x: Tensor) -> Tensor:
        """Rotary positions on pairs of neighbours, as complex numbers."""
        width = self.turned
        power = torch.arange(0, width, 2, dtype=torch.float64) / width
        angle = torch.arange(x.shape[2], dtype=torch.float64)[:, None] * self.base**-power
        pairs = torch.view_as_complex(x.double().unflatten(-1, (width // 2, 2)))
        turned = pairs * torch.polar(torch.ones_like(angle), angle)
        return torch.view_as_real(turned).flatten(-2).float()


def _version() -> str:
    from importlib.metadata import version

    return version("gguf")

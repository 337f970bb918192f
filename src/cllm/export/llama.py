"""A model as Llama has it: the tensors and names of transformers' ``LlamaForCausalLM``.

What Llama lacks and what can be folded into it exactly: tables of any kind (their product), and the
feed-forward part of GPT-2, whose gate the activation sits on and whose other factor is a bias of 1. What
cannot be is refused: the reason is in ``refuse``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cllm.core.errors import UserError
from cllm.core.model_config import ModelConfig
from cllm.model.attention import Attention
from cllm.model.mlp import GELU, SwiGLU
from cllm.model.transformer import Block, Transformer

ELSEWHERE = "export to onnx, torchscript, torch-export or aoti"
"""The formats that hold a graph of our own, and so every model."""


@dataclass(frozen=True, eq=False)
class Llama:
    """Tensors by transformers' names, a tied table once."""

    config: ModelConfig
    tensors: dict[str, Tensor]
    gated: bool
    """Whether the feed-forward part is SwiGLU; else it is GELU beside a factor of 1."""


def refuse(config: ModelConfig, target: str, *, gelu: bool) -> None:
    """Raise ``UserError`` where a Llama of ``target`` cannot hold the model exactly.

    ``gelu``: whether ``target`` has an activation other than SiLU.
    """
    reasons = {
        "batchnorm": "its factors come from training, and Llama's norm divides by each vector's own",
        "layernorm": "the last one's bias adds to every logit, and Llama's head has no bias",
    }
    if config.norm in reasons:
        raise UserError(
            f"{target} cannot hold model.norm = {config.norm!r}: {reasons[config.norm]}; {ELSEWHERE}"
        )
    if config.positions == "learned":
        raise UserError(
            f"{target} cannot hold model.positions = 'learned': Llama turns queries and keys, and "
            f"adds nothing to the embeddings; {ELSEWHERE}"
        )
    if config.mlp == "gelu" and not gelu:
        raise UserError(
            f"{target} cannot hold model.mlp = 'gelu': its Llama has SiLU only; "
            f"export to hf, or {ELSEWHERE.removeprefix('export ')}"
        )


def as_llama(model: Transformer) -> Llama:
    """The tensors of a model whose tables are plain (see ``source.plain``)."""
    config = model.config
    tensors = {"model.embed_tokens.weight": model.embedding.weight.detach()}
    for number, block in enumerate(model.layers):
        assert isinstance(block, Block)
        for name, tensor in _block(block).items():
            tensors[f"model.layers.{number}.{name}"] = tensor.detach().contiguous()
    tensors["model.norm.weight"] = model.norm.weight.detach()
    if model.head is not None:
        tensors["lm_head.weight"] = model.head.weight.detach()
    return Llama(config, tensors, gated=config.mlp == "swiglu")


def _block(block: Block) -> dict[str, Tensor]:
    attention, mlp = block.attention, block.mlp
    assert isinstance(attention, Attention)
    heads = (attention.heads, attention.kv_heads, attention.kv_heads)
    q, k, v = attention.qkv.weight.split([n * attention.head_dim for n in heads])
    found = {
        "input_layernorm.weight": block.attention_norm.weight,
        "self_attn.q_proj.weight": q,
        "self_attn.k_proj.weight": k,
        "self_attn.v_proj.weight": v,
        "self_attn.o_proj.weight": attention.out.weight,
        "post_attention_layernorm.weight": block.mlp_norm.weight,
        "mlp.down_proj.weight": mlp.out.weight,
    }
    if isinstance(mlp, SwiGLU):
        gate, up = mlp.gate_up.weight.chunk(2)
        return found | {"mlp.gate_proj.weight": gate, "mlp.up_proj.weight": up}
    assert isinstance(mlp, GELU)
    # act(gate x) · (up x + bias) with up = 0 and bias = 1; transformers has all three biases or none.
    width = mlp.up.weight.shape[0]
    return found | {
        "mlp.gate_proj.weight": mlp.up.weight,
        "mlp.up_proj.weight": torch.zeros_like(mlp.up.weight),
        "mlp.gate_proj.bias": torch.zeros(width),
        "mlp.up_proj.bias": torch.ones(width),
        "mlp.down_proj.bias": torch.zeros(mlp.out.weight.shape[0]),
    }

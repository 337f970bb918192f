"""The transformer as inference runs it: read a text in one pass, or one token for each of S slots.

The same function as ``cllm.model.transformer`` in evaluation, with the scales (and for batch and layer
norm the shifts) of the norms before a matrix folded into it, which is exact but for rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from cllm.infer.cache import Entry, entries, load, store
from cllm.infer.stored import KINDS, Integers, head_of, matrix_of, summary
from cllm.infer.weights import keep, pack
from cllm.model.attention import rotate
from cllm.model.mlp import gelu_tanh
from cllm.model.norms import BatchNorm, LayerNorm, RMSNorm, folded, wide
from cllm.model.transformer import Block, Transformer
from cllm.store.packing import GridMatrix


class Normed(nn.Module):
    """A norm and the matrices behind it: the norm's scale is folded into the matrix, unless that is to be
    of the integers that a file ``held``."""

    bias: Tensor | None
    gain: Tensor | None

    def __init__(
        self, norm: nn.Module, weight_rd: Tensor, kind: str, held: GridMatrix | None = None
    ) -> None:
        super().__init__()
        gain, shift, weight = _affine(norm), None, wide(weight_rd.detach())
        self.norm = "batchnorm" if isinstance(norm, BatchNorm) else "rmsnorm"
        if isinstance(norm, LayerNorm):
            self.norm = "layernorm"
        assert isinstance(norm, RMSNorm | LayerNorm | BatchNorm)
        self.eps = norm.eps
        if isinstance(norm, BatchNorm):
            # In evaluation batch norm is affine: with what follows it, one matrix and one vector.
            gain, shift = folded(norm)
        elif isinstance(norm, LayerNorm):
            shift = wide(norm.bias.detach())
        self.register_buffer("bias", None if shift is None else weight @ shift)
        self.register_buffer("gain", None if held is None else gain)
        folded_in = weight if held is not None else weight * gain
        self.matrix = matrix_of(folded_in.to(weight_rd.dtype), kind, held)

    def forward(self, x_nd: Tensor) -> Tensor:
        """(N, D) -> (N, R)."""
        x_nd = normalised(x_nd, self.norm, self.eps)
        made: Tensor = self.matrix(keep(x_nd if self.gain is None else x_nd * self.gain))
        return made if self.bias is None else made + self.bias


def _affine(norm: nn.Module) -> Tensor:
    assert isinstance(norm.weight, Tensor)
    return wide(norm.weight.detach())


def normalised(x_nd: Tensor, norm: str, eps: float) -> Tensor:
    """``x`` by a norm without its gain and shift; batch norm is all gain and shift."""
    if norm == "batchnorm":
        return x_nd
    if norm == "layernorm":
        x_nd = keep(x_nd - x_nd.mean(-1, keepdim=True))
    # As sum / D: torch's mean of a float32 divides by an integer, number by number.
    square = x_nd.square().sum(-1, keepdim=True) * (1 / x_nd.shape[-1])
    return x_nd * torch.rsqrt(square + eps)


class InferenceBlock(nn.Module):
    """A block of the transformer over vectors (N, D).

    ``integers``: those that a file holds, by the parameters' names within the block.
    """

    def __init__(self, block: Block, kind: str, integers: Integers) -> None:
        super().__init__()
        attention, mlp = block.attention, block.mlp
        self.heads, self.kv_heads = attention.heads, attention.kv_heads
        self.head_dim = attention.head_dim
        held = integers.get
        qkv, out = attention.qkv.weight, attention.out.weight
        self.qkv = Normed(block.attention_norm, qkv, kind, held("attention.qkv.weight"))
        self.mixed = matrix_of(out, kind, held("attention.out.weight"))
        self.gated = hasattr(mlp, "gate_up")
        name = "gate_up" if self.gated else "up"
        up: nn.Linear = getattr(mlp, name)
        self.up = Normed(block.mlp_norm, up.weight, kind, held(f"mlp.{name}.weight"))
        self.down = matrix_of(mlp.out.weight, kind, held("mlp.out.weight"))

    def split(
        self, x_nd: Tensor, rotary: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (N, H, K), divided by √K already, keys and values (N, G, K)."""
        groups = (self.heads, self.kv_heads, self.kv_heads)
        qkv = self.qkv(x_nd).view(len(x_nd), sum(groups), self.head_dim)
        q, k, v = qkv.split(groups, dim=1)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        return q * self.head_dim**-0.5, k, v

    def finish(self, x_nd: Tensor, mixed_nd: Tensor) -> Tensor:
        """What attention found and the feed-forward part, added to the stream."""
        x_nd = keep(x_nd + self.mixed(mixed_nd))
        up = self.up(x_nd)
        if self.gated:
            gate, up = up.chunk(2, dim=-1)
            made = functional.silu(gate) * up
        else:
            made = gelu_tanh(up)
        return keep(x_nd + self.down(keep(made)))


class Network(nn.Module):
    """A model ready for inference, with weights of ``kind`` (``cllm.infer.weights``).

    ``integers`` that a compressed file holds are taken as they are by a kind that is made of integers
    (``cllm.infer.stored``); raises ``UsageError`` where it cannot hold them. Without ``scored`` there is no
    output table, and logits are the hidden vectors. ``tokens``: those that are known to the tokenizer, the
    first rows of the table (none: all).
    """

    table: Tensor
    positions: Tensor | None
    cos: Tensor
    sin: Tensor
    gain: Tensor
    shift: Tensor | None

    def __init__(
        self,
        model: Transformer,
        kind: str = "fp32",
        cache_kind: str = "fp32",
        *,
        scored: bool = True,
        tokens: int | None = None,
        integers: Integers | None = None,
    ) -> None:
        super().__init__()
        self.tokens = tokens if scored and tokens != model.config.vocab_size else None
        integers = {} if kind not in KINDS else integers or {}
        self.config, self.cache_kind = model.config, cache_kind
        self.integers = summary(integers)
        """What the file's integers are that it multiplies with; empty where it has none of them."""
        # A reduced or composed table is folded into (V, D): looked up, it then costs a row.
        table = model.embedding.table().detach()
        low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(kind)
        self.register_buffer("table", table if low is None else table.to(low))
        learned = None if model.positions is None else wide(model.positions.detach())
        self.register_buffer("positions", learned)
        self.register_buffer("cos", model.cos)
        self.register_buffer("sin", model.sin)
        self.layers = nn.ModuleList()
        for number, block in enumerate(model.layers):
            assert isinstance(block, Block)
            self.layers.append(InferenceBlock(block, kind, _within(integers, f"layers.{number}.")))
        norm = model.norm
        self.norm = {RMSNorm: "rmsnorm", LayerNorm: "layernorm"}.get(type(norm), "batchnorm")
        self.eps = norm.eps
        if isinstance(norm, BatchNorm):
            gain, shift = folded(norm)
        else:
            gain = _affine(norm)
            shift = wide(norm.bias.detach()) if isinstance(norm, LayerNorm) else gain * 0
        # Not folded into the output table: that one is the input's as well, where they are tied.
        self.register_buffer("gain", gain)
        self.register_buffer("shift", shift if bool(shift.any()) else None)
        self.head: nn.Module = nn.Identity()
        if scored:
            out = table if model.head is None else model.output.table().detach()
            held = integers.get("embedding.weight" if model.head is None else "head.weight")
            self.head = head_of(out, kind, held) if integers else pack(out, kind)

    def decode(
        self, tokens_s: Tensor, positions_s: Tensor, *buffers: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One token for each slot, at its position; keys and values are written into the cache.

        Returns logits (S, V), the likeliest known token (S,) and the sum of the logits (S,), which is not
        finite if one of them is not.
        """
        slots = torch.arange(len(tokens_s), device=tokens_s.device)[:, None]
        heads = torch.arange(self.config.kv_heads, device=tokens_s.device)[None]
        capacity = torch.arange(buffers[0].shape[2], device=tokens_s.device)
        x = self._embed(tokens_s, positions_s)
        unseen = keep(torch.where(capacity <= positions_s[:, None], 0.0, float("-inf")).to(x.dtype))
        rotary = None
        if self.positions is None:
            rotary = (keep(self.cos[positions_s])[:, None], keep(self.sin[positions_s])[:, None])
        for block, (keys, values) in self._layers(buffers):
            q, k, v = block.split(x, rotary)
            at = (slots, heads, positions_s[:, None])
            store(keys, at, k)
            store(values, at, v)
            mixed = attend_one(q, load(keys, x.dtype), load(values, x.dtype), unseen)
            x = block.finish(x, mixed)
        logits = self.logits(self.finished(x))
        return logits, logits[:, : self.tokens].argmax(-1), logits.sum(-1)

    forward = decode  # what is exported

    def read(self, ids_t: Tensor, slot: int, *buffers: Tensor) -> Tensor:
        """Read a text into a slot in one pass, from position 0; hidden vectors (T, D)."""
        return self._read(ids_t, slot, buffers)

    def hidden(self, ids_t: Tensor) -> Tensor:
        """Hidden vectors (T, D) of a text, nothing kept."""
        return self._read(ids_t, 0, None)

    def finished(self, x_nd: Tensor) -> Tensor:
        """Hidden vectors (N, D) behind the last norm."""
        x_nd = normalised(x_nd, self.norm, self.eps) * self.gain
        return keep(x_nd if self.shift is None else x_nd + self.shift)

    def logits(self, hidden_nd: Tensor) -> Tensor:
        """Logits (N, V) in the residual stream's precision."""
        made: Tensor = self.head(hidden_nd)
        return made

    def _layers(
        self, buffers: tuple[Tensor, ...]
    ) -> list[tuple[InferenceBlock, tuple[Entry, Entry]]]:
        return list(zip(self.layers, entries(buffers, self.cache_kind), strict=True))  # type: ignore[arg-type]

    def _embed(self, ids_n: Tensor, positions_n: Tensor) -> Tensor:
        x = wide(self.table[ids_n])
        return keep(x if self.positions is None else x + self.positions[positions_n])

    def _read(self, ids_t: Tensor, slot: int, buffers: tuple[Tensor, ...] | None) -> Tensor:
        length = len(ids_t)
        x = self._embed(ids_t, torch.arange(length, device=ids_t.device))
        rotary = None
        if self.positions is None:
            rotary = (self.cos[:length, None], self.sin[:length, None])
        caches = [None] * len(self.layers) if buffers is None else entries(buffers, self.cache_kind)
        for block, cache in zip(self.layers, caches, strict=True):
            assert isinstance(block, InferenceBlock)
            q, k, v = (part.transpose(0, 1) for part in block.split(x, rotary))
            if cache is not None:
                for entry, new in zip(cache, (k, v), strict=True):
                    store(entry, (slot, slice(None), slice(0, length)), new)
            # What is read now is attended to unrounded, whatever the cache holds.
            mixed = functional.scaled_dot_product_attention(
                q[None], k[None], v[None], is_causal=True, scale=1.0, enable_gqa=len(k) != len(q)
            )
            x = block.finish(x, mixed[0].transpose(0, 1).reshape(length, -1))
        return self.finished(x)


def _within(integers: Integers, prefix: str) -> Integers:
    """Those whose names begin with ``prefix``, by the rest of the names."""
    found = {name: held for name, held in integers.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): held for name, held in found.items()}


def attend_one(q_shk: Tensor, k_sgck: Tensor, v_sgck: Tensor, unseen_sc: Tensor) -> Tensor:
    """One query for each slot over its whole cache, (S, H·K); grouped queries share keys and values."""
    slots, groups, _, width = k_sgck.shape
    q = q_shk.reshape(slots, groups, -1, width)
    bias = unseen_sc[:, None, None]
    if torch.compiler.is_compiling():  # loops over the stored numbers, as in ``weights``
        q = keep(q)
        scores = keep((q[:, :, :, None] * k_sgck[:, :, None]).sum(-1) + bias)
        shares = keep(torch.softmax(scores, -1))
        mixed = (shares[..., None] * v_sgck[:, :, None]).sum(3)
    else:
        shares = torch.softmax(q @ k_sgck.transpose(-1, -2) + bias, -1)
        mixed = shares @ v_sgck
    return keep(mixed.reshape(slots, -1))

"""Feed-forward parts: SwiGLU (Shazeer 2020) and the GELU of GPT-2."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from cllm.core.model_config import ModelConfig
from cllm.model.norms import wide


class SwiGLU(nn.Module):
    """down(silu(gate x) · up x); gate and up are one matrix, so that they are one product."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.d_model, 2 * config.d_ff, bias=False)
        self.out = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x_btd: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        gate, up = self.gate_up(x_btd).chunk(2, dim=-1)
        return self.out(functional.silu(gate) * up)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh form (Hendrycks & Gimpel 2016), by ½(1 + tanh z) = σ(2z).

    Vectorised exp is cheaper than vectorised tanh: in a small compiled model this halves its cost.
    """
    return x * torch.sigmoid((x + 0.044715 * x * x * x) * (2 * (2 / math.pi) ** 0.5))


class GELU(nn.Module):
    """out(gelu(up x)), the gelu in its tanh form."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.out = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x_btd: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        up = self.up(x_btd)
        return self.out(gelu_tanh(wide(up)).to(up.dtype))


MLPS: dict[str, type[SwiGLU | GELU]] = {"swiglu": SwiGLU, "gelu": GELU}

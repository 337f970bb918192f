"""Feed-forward parts: SwiGLU (Shazeer 2020) and the GELU of GPT-2."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from cllm.core.config import ModelConfig


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


class GELU(nn.Module):
    """out(gelu(up x)), the gelu in its tanh form."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.out = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x_btd: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.out(functional.gelu(self.up(x_btd), approximate="tanh"))


MLPS: dict[str, type[SwiGLU | GELU]] = {"swiglu": SwiGLU, "gelu": GELU}

"""Normalisation: RMSNorm, LayerNorm, and a batch norm that cannot see the future.

Statistics are taken in float32 at least, whatever the weights' precision.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cllm.core.model_config import ModelConfig

Statistics = list[tuple[str, Tensor]]
"""Batch statistics of one forward pass: (name of the running average, its new observation)."""


def wide(x: Tensor) -> Tensor:
    """``x`` in float32, or in float64 if it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight (Zhang & Sennrich 2019)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_btd: Tensor, statistics: Statistics | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D) in the weight's precision."""
        x = wide(x_btd)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return x.to(self.weight.dtype) * self.weight


class LayerNorm(nn.Module):
    """(x − mean) / sqrt(var + eps) · weight + bias (Ba, Kiros & Hinton 2016)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x_btd: Tensor, statistics: Statistics | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D) in the weight's precision."""
        x = wide(x_btd)
        x = x - x.mean(-1, keepdim=True)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return x.to(self.weight.dtype) * self.weight + self.bias


class BatchNorm(nn.Module):
    """Batch norm (Ioffe & Szegedy 2015) for causal models.

    Statistics over batch and time together would let position t see what comes after it. In training
    they are taken at each position over the windows of the micro-batch; in evaluation they are running
    averages for each channel, pooled over positions (so any length can be evaluated). The two modes
    therefore differ, and training reports by how much.
    """

    momentum = 0.05
    running_mean: Tensor
    running_square: Tensor

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.name = ""
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_square", torch.ones(width))

    def forward(self, x_btd: Tensor, statistics: Statistics | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D); in training, observations are appended to ``statistics``."""
        x = wide(x_btd)
        if self.training:
            mean, square = x.mean(0, keepdim=True), x.square().mean(0, keepdim=True)
            if statistics is not None:
                statistics.append((f"{self.name}.running_mean", mean.mean((0, 1)).detach()))
                statistics.append((f"{self.name}.running_square", square.mean((0, 1)).detach()))
            variance = (x - mean).square().mean(0, keepdim=True)
        else:
            mean = self.running_mean
            variance = (self.running_square - mean.square()).clamp_min(0)
        x = (x - mean) * torch.rsqrt(variance + self.eps)
        return x.to(self.weight.dtype) * self.weight + self.bias


def folded(norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """Gain and shift (D,) with norm(x) = gain·x + shift in evaluation, worked out in float64."""
    mean, square = norm.running_mean.double(), norm.running_square.double()
    variance = (square - mean.square()).clamp_min(0)
    gain = norm.weight.detach().double() * torch.rsqrt(variance + norm.eps)
    shift = norm.bias.detach().double() - mean * gain
    dtype = wide(norm.weight).dtype
    return gain.to(dtype), shift.to(dtype)


NORMS: dict[str, type[RMSNorm | LayerNorm | BatchNorm]] = {
    "rmsnorm": RMSNorm,
    "layernorm": LayerNorm,
    "batchnorm": BatchNorm,
}


def start_norm(norm: RMSNorm | LayerNorm | BatchNorm) -> None:
    """Make ``norm`` as it was when it was built."""
    nn.init.ones_(norm.weight)
    if not isinstance(norm, RMSNorm):
        nn.init.zeros_(norm.bias)
    if isinstance(norm, BatchNorm):
        norm.running_mean.zero_()
        norm.running_square.fill_(1.0)


def make_norm(config: ModelConfig) -> RMSNorm | LayerNorm | BatchNorm:
    """The norm that ``model.norm`` names."""
    return NORMS[config.norm](config.d_model, config.norm_eps)

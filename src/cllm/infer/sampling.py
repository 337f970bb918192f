"""Choosing the next token from logits: greedy, temperature, top-k, top-p."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cllm.core.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn. ``temperature`` 0 takes the likeliest; ``top_k`` 0 and ``top_p`` 1 are off."""

    max_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        checks = {
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "0 (greedy) or more"),
            "top_k": (self.top_k >= 0, "0 (off) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
        }
        for name, (holds, wanted) in checks.items():
            if not holds:
                raise UsageError(f"{name} = {getattr(self, name)} must be {wanted}")


def choose_token(logits_v: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draw one token from logits (V,).

    Top-k keeps the k likeliest; top-p (nucleus sampling, Holtzman et al. 2020) of those the fewest whose
    probabilities reach p. The draw is made on the CPU, so that a seed means the same everywhere.
    """
    logits = logits_v.detach().to("cpu", torch.float64)
    if sampling.temperature == 0:
        return int(logits.argmax())
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.numel():
        kept = torch.topk(logits, sampling.top_k).indices
        logits = torch.full_like(logits, float("-inf")).index_copy(0, kept, logits[kept])
    probabilities = torch.softmax(logits, dim=-1)
    if sampling.top_p < 1:
        ordered, order = torch.sort(probabilities, descending=True, stable=True)
        beyond = ordered.cumsum(0) - ordered >= sampling.top_p
        probabilities = probabilities.index_fill(0, order[beyond], 0.0)
    return int(torch.multinomial(probabilities, 1, generator=generator))

"""The gradient's factor: loss scale taken back, norm clipped, and whether it may be applied at all."""

from __future__ import annotations

import math

import torch
from torch import Tensor


@torch.library.custom_op("cllm::clip_factor", mutates_args=())
def clip_factor(norm: Tensor, loss: Tensor, unscale: Tensor, clip: float) -> Tensor:
    """(2,): the factor for the gradient (``unscale``, and clipping at ``clip`` if that is above 0), and
    1.0 if norm and loss are finite, else 0.0.

    An operator of its own, so that Inductor computes it once and not again for each element of the
    update that it is fused into; four divisions an element were a third of a small model's step.
    """
    if norm.device.type == "cpu":  # plain numbers are quicker than six tiny operations
        size, usable = float(norm), math.isfinite(norm) and math.isfinite(loss)
        share = min(clip / (size + 1e-6), 1.0) if clip > 0 else 1.0
        return torch.tensor([float(unscale) * share, float(usable)], dtype=norm.dtype)
    factor = unscale * (clip / (norm + 1e-6)).clamp_max(1.0) if clip > 0 else unscale
    finite = torch.isfinite(norm) & torch.isfinite(loss)
    return torch.stack([factor, finite.to(factor.dtype)])


@clip_factor.register_fake
def _(norm: Tensor, loss: Tensor, unscale: Tensor, clip: float) -> Tensor:
    return norm.new_empty(2)

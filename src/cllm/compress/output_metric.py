"""What an error in a layer's outputs costs the whole model: Kronecker-factored Fisher information.

Errors E of a weight cost about ½ vec(E)ᵀ F vec(E) nats, F the Fisher information of the model's own
predictions, and F ≈ G ⊗ H (K-FAC, Martens & Grosse 2015): G = E[ggᵀ] over the gradients g of −log p in the
layer's outputs, and H = E[xxᵀ] of its inputs, here with each token as heavy as ‖g‖². Rows are then no
longer alone: an error in one can make up for that in another (Tseng et al., "Model-preserving adaptive
rounding", 2025).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from cllm.compress.divergence import batch_windows
from cllm.compress.moments import add_products, mirrored
from cllm.model.transformer import Transformer
from cllm.training.progress import Progress


@dataclass(frozen=True, eq=False)
class OutputMetric:
    """Of one layer: ``outer`` (m, m) float32, E[ggᵀ] as well as the tokens tell it, and ``saliency`` (W, T)
    float32, ‖g‖² of each."""

    outer: Tensor
    saliency: Tensor


def output_metrics(
    model: Transformer, windows: np.ndarray, progress: Progress, *, seed: int = 0
) -> dict[str, OutputMetric]:
    """Of every linear layer of the blocks, by module name, on ``windows`` (W, T).

    The next tokens are drawn from what ``model`` predicts, by ``seed``: of the text's own, gradients would
    not have the Fisher information as their second moment. What is seen of ggᵀ is drawn to a multiple of
    the identity as far as chance is in it. ``model`` loses its parameters' gradients. All layers' metrics
    are in memory together.
    """
    model = model.eval().requires_grad_(False)
    linear = {
        f"layers.{i}.{name}": module
        for i, block in enumerate(model.layers)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    }
    outer = {name: torch.zeros(one.out_features, one.out_features) for name, one in linear.items()}
    # In one piece from the start: what is kept of each batch would lie between the freed blocks of two, and
    # memory would grow by a batch's logits with each.
    saliency = {name: torch.zeros(windows.shape) for name in linear}
    batch = slice(0)

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def seen(gradient: Tensor) -> None:
            rows = gradient.flatten(0, -2)
            add_products(outer[name], rows)
            torch.sum(gradient.square(), dim=-1, out=saliency[name][batch])

        def ran(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.requires_grad:
                output.requires_grad_()
            output.register_hook(seen)

        return ran

    handles = [one.register_forward_hook(watch(name)) for name, one in linear.items()]
    generator = torch.Generator().manual_seed(seed)
    ids = torch.as_tensor(windows)
    try:
        with progress.stage("measuring what outputs matter", len(ids)) as advance:
            for part in ids.split(batch_windows(ids.shape[1])):
                batch = slice(batch.stop, batch.stop + len(part))
                logits = model(part).flatten(0, 1)
                drawn = torch.multinomial(logits.detach().softmax(dim=-1), 1, generator=generator)
                functional.cross_entropy(logits, drawn[:, 0], reduction="sum").backward()
                advance(len(part))
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for name, total in outer.items():
        mean, sizes = mirrored(total) / ids.numel(), saliency[name]
        level = torch.eye(len(mean)) * (torch.trace(mean) / len(mean))
        fourth = float(sizes.double().square().mean())
        found[name] = OutputMetric(drawn_to(mean, level, fourth, sizes.numel()), sizes)
    return found


def drawn_to(mean: Tensor, target: Tensor, fourth: float, count: int) -> Tensor:
    """The second moment ``mean`` of ``count`` vectors, whose fourth powers of length are ``fourth`` on
    average, drawn to ``target`` as far as its distance from that may be chance (Ledoit & Wolf, "A
    well-conditioned estimator for large-dimensional covariance matrices", 2004)."""
    distance = float((mean - target).double().square().sum())
    chance = max(fourth - float(mean.double().square().sum()), 0.0) / count
    share = min(1.0, chance / distance) if distance > 0 else 1.0
    return (1 - share) * mean + share * target

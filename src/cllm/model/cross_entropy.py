"""The output head and its cross-entropy in one: loss and both gradients, in few passes over the logits.

The (N, V) logits are by far the largest tensor of a small model. Computing their softmax, its gradient
and two matrix products the usual way reads and writes them in float32 many times. Here the
unnormalised e = exp(l − max l) is written once, in the weights' precision, and goes into both products;
the softmax's denominator is applied to the rows of the results instead:

    p = e / z,   dL/dl = s (p − 1_y)
    dL/dh = (s/z) (ē W) + s (p_y − 1) W_y,      dL/dW = ēᵀ ((s/z) h) + Σ s (p_y − 1) h at row y

where ē is e with the target's entry zeroed: p_y − 1 is added apart, in float32, because it would
otherwise lose its digits when p_y is near 1. Rows can be taken ``chunk`` at a time, so that the logits
never exist whole (as in Cut Cross-Entropy, Wijmans et al. 2024, and Liger kernels, 2024).
"""

from __future__ import annotations

import torch
from torch import Tensor

from cllm.model.embedding import add_rows
from cllm.model.norms import wide

IGNORE = -100
"""Target of a position that is not scored."""


def linear_cross_entropy(
    h_nd: Tensor, table_vd: Tensor, targets_n: Tensor, scale: Tensor, chunk: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed loss in nats, and the gradients of ``scale`` times it.

    ``h_nd`` (N, D) and ``table_vd`` (V, D) share a precision; ``targets_n`` (N,) are ids, or ``IGNORE``;
    ``scale`` is a scalar tensor. ``chunk`` rows are computed at a time, 0 means all. Returns the loss
    (scalar, float32 at least), dL/dh (N, D) in ``h_nd``'s precision and dL/dW (V, D) in float32 at least.
    """
    size = chunk or max(h_nd.shape[0], 1)
    table_grad = wide(torch.zeros_like(table_vd))
    loss = wide(h_nd.new_zeros(()))
    grads, pulls = [], []
    for h, y in zip(h_nd.split(size), targets_n.split(size), strict=True):
        scored = y != IGNORE
        index = torch.where(scored, y, 0)[:, None]
        logits = h @ table_vd.T
        top = wide(logits.amax(-1, keepdim=True))
        power = torch.exp(wide(logits) - top)
        total = power.sum(-1, keepdim=True)
        own = wide(logits.gather(1, index)) - top
        weight = torch.where(scored, scale, 0.0)[:, None]
        loss = loss + torch.where(scored[:, None], total.log() - own, 0.0).sum()
        columns = torch.arange(table_vd.shape[0], device=y.device)
        others = torch.where(columns == index, 0.0, power).to(h.dtype)
        share = weight / total
        pull = weight * (own.exp() / total - 1.0)
        grad = wide(others @ table_vd) * share + wide(table_vd[index[:, 0]]) * pull
        grads.append(grad.to(h.dtype))
        table_grad = table_grad + wide(others.T @ (wide(h) * share).to(h.dtype))
        pulls.append(wide(h) * pull)
    ids = torch.where(targets_n != IGNORE, targets_n, 0)
    table_grad = table_grad + add_rows(torch.cat(pulls), ids, table_vd.shape[0])
    return loss, torch.cat(grads), table_grad


def cross_entropy_sum(h_nd: Tensor, table_vd: Tensor, targets_n: Tensor, chunk: int = 0) -> Tensor:
    """The summed loss alone, in nats, for evaluation."""
    size = chunk or max(h_nd.shape[0], 1)
    loss = wide(h_nd.new_zeros(()))
    for h, y in zip(h_nd.split(size), targets_n.split(size), strict=True):
        logits = wide(h @ table_vd.T)
        loss = loss + torch.nn.functional.cross_entropy(
            logits, y, ignore_index=IGNORE, reduction="sum"
        )
    return loss

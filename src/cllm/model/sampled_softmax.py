"""Sampled softmax: an estimate of the cross-entropy from the target and a few candidates, with gradients.

The softmax's denominator Z = Σ_v exp(l_v) over the vocabulary is replaced by the target's term and a
sum over candidates, each divided by the number of times that it was expected among them,

    Ẑ = exp(l_y) + Σ_{c ≠ y} exp(l_c − log E[count of c]),

which is Z on average: importance sampling (Bengio & Senécal 2008), with candidates shared by all
positions of a batch (Jean et al. 2015). A candidate that is a position's own target is left out there.
The loss log Ẑ − l_y is an *estimate* of the cross-entropy: since log is concave it is too low on average,
the less so the more candidates there are, and it is exact when every token is one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cllm.model.cross_entropy import IGNORE
from cllm.model.embedding import add_rows
from cllm.model.norms import wide


def sampled_cross_entropy(
    h_nd: Tensor,
    table_vd: Tensor,
    targets_n: Tensor,
    candidates_c: Tensor,
    log_expected_c: Tensor,
    scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed estimate in nats, and the gradients of ``scale`` times it.

    ``h_nd`` (N, D) and ``table_vd`` (V, D) share a precision; ``targets_n`` (N,) are rows of the table, or
    ``IGNORE``; ``candidates_c`` (C,) are rows, too, and ``log_expected_c`` (C,) the logarithms of how often
    each was expected. Returns what ``linear_cross_entropy`` does: the loss, dL/dh (N, D) in ``h_nd``'s
    precision and dL/dW (V, D) in float32 at least.
    """
    scored = targets_n != IGNORE
    own_rows = torch.where(scored, targets_n, 0)
    own_nd, others_cd = table_vd[own_rows], table_vd[candidates_c]
    own = (wide(h_nd) * wide(own_nd)).sum(-1, keepdim=True)
    corrected = wide(h_nd @ others_cd.T) - log_expected_c.to(own.dtype)
    corrected = torch.where(candidates_c == own_rows[:, None], -torch.inf, corrected)
    top = torch.maximum(corrected.amax(-1, keepdim=True), own)
    power, own_power = torch.exp(corrected - top), torch.exp(own - top)
    total = power.sum(-1, keepdim=True) + own_power
    loss = torch.where(scored[:, None], total.log() + top - own, 0.0).sum()
    weight = torch.where(scored, scale, 0.0)[:, None]
    share = weight / total
    pull = weight * (own_power / total - 1.0)
    low = power.to(h_nd.dtype)
    h_grad = wide(low @ others_cd) * share + wide(own_nd) * pull
    others_grad = wide(low.T @ (wide(h_nd) * share).to(h_nd.dtype))
    rows = torch.cat([others_grad, wide(h_nd) * pull])
    table_grad = add_rows(rows, torch.cat([candidates_c, own_rows]), table_vd.shape[0])
    return loss, h_grad.to(h_nd.dtype), table_grad

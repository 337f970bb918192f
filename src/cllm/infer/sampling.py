"""Choosing the next token from logits: greedy, or drawn by temperature, top-k, top-p and min-p.

A draw is the inverse of the cumulative distribution at one uniform number, which comes from the
request's own generator. So a request's tokens depend on its seed and its logits, and on nothing else that
is generated at the same time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from cllm.infer.request import Sampling

__all__ = ["Sampling", "candidates", "choose_token", "choose_tokens", "penalised", "uniform"]


def choose_token(
    logits_v: Tensor, sampling: Sampling, generator: torch.Generator, seen: Iterable[int] = ()
) -> int:
    """One token from logits (V,); ``seen`` are the ids that the repetition penalty makes less likely."""
    logits = penalised(logits_v[None], sampling, [seen])
    return choose_tokens(logits, sampling, [uniform(generator)])[0]


def uniform(generator: torch.Generator) -> float:
    """A number in [0, 1), made on the CPU, so that a seed means the same everywhere."""
    return float(torch.rand((), generator=generator, dtype=torch.float64))


def penalised(logits_nv: Tensor, sampling: Sampling, seen: Sequence[Iterable[int]]) -> Tensor:
    """Logits with those of seen tokens divided by the penalty, or multiplied if negative (CTRL, Keskar et
    al. 2019); ``seen`` holds the ids of each row."""
    penalty = sampling.repetition_penalty
    if penalty == 1:
        return logits_nv
    logits_nv = logits_nv.clone()
    for row, ids in zip(logits_nv, seen, strict=True):
        known = torch.tensor(sorted(set(ids)), dtype=torch.long, device=row.device)
        values = row[known]
        row[known] = torch.where(values > 0, values / penalty, values * penalty)
    return logits_nv


def choose_tokens(logits_nv: Tensor, sampling: Sampling, uniforms: Sequence[float]) -> list[int]:
    """A token for each row of logits (N, V), drawn at ``uniforms``."""
    if sampling.is_greedy:
        return logits_nv.argmax(-1).tolist()
    ids, shares = candidates(logits_nv, sampling)
    cumulative = shares.cumsum(-1)
    at = torch.tensor(uniforms, dtype=cumulative.dtype)[:, None] * cumulative[:, -1:]
    # The first whose cumulative share lies above: one of share 0 is never that, rounding included.
    place = (cumulative <= at).sum(-1, keepdim=True).clamp_max(shares.shape[1] - 1)
    return (place if ids is None else ids.gather(1, place))[:, 0].tolist()


def candidates(logits_nv: Tensor, sampling: Sampling) -> tuple[Tensor | None, Tensor]:
    """Ids (N, k), the likeliest first (none: all V in their order), and their shares (N, k).

    Top-k keeps the k likeliest; of those min-p (Nguyen et al. 2024) keeps what has at least that fraction
    of the likeliest one's probability, and top-p (nucleus sampling, Holtzman et al. 2020) the fewest whose
    probabilities reach p. A share is 0 for what is left out; the shares need not sum to 1.
    """
    logits, k = logits_nv.detach().cpu(), sampling.top_k
    ids: Tensor | None = None
    if 0 < k < logits.shape[1]:
        logits, ids = logits.topk(k, sorted=True)
    elif sampling.top_p < 1:
        logits, ids = logits.sort(descending=True, stable=True)
    logits = logits.double()
    # Less the highest, so that no temperature, however low, makes an infinity of it.
    shares = torch.softmax((logits - logits.amax(-1, keepdim=True)) / sampling.temperature, -1)
    if sampling.min_p > 0:
        shares = shares * (shares >= sampling.min_p * shares.amax(-1, keepdim=True))
    if sampling.top_p < 1:
        before = shares.cumsum(-1) - shares
        shares = shares * (before < sampling.top_p * shares.sum(-1, keepdim=True))
    return ids, shares

"""Choosing the next token from logits: greedy, or drawn by temperature, top-k, top-p and min-p.

A draw is the inverse of the cumulative distribution at one uniform number, which comes from the
request's own generator. So a request's tokens depend on its seed and its logits, and on nothing else that
is generated at the same time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cllm.core.errors import UsageError

MOST_LOGPROBS = 100
"""Alternatives that may be asked for at each token."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn.

    ``temperature`` 0 takes the likeliest; ``top_k`` 0, ``top_p`` 1, ``min_p`` 0 and ``repetition_penalty``
    1 are off. ``stop``: texts before which the output ends. ``logprobs``: alternatives to report with
    each token's log-probability; none reports nothing.
    """

    max_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        checks = {
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            "top_k": (self.top_k >= 0, "0 (off) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "in 0 (off) … 1"),
            "repetition_penalty": (
                0 < self.repetition_penalty < float("inf"),
                "above 0; 1 is off",
            ),
            "seed": (0 <= self.seed < 2**63, "in 0 … 2⁶³ − 1"),
            "stop": (all(self.stop), "texts that are not empty"),
            "logprobs": (
                self.logprobs is None or 0 <= self.logprobs <= MOST_LOGPROBS,
                f"in 0 … {MOST_LOGPROBS}",
            ),
        }
        for name, (holds, wanted) in checks.items():
            if not holds:
                raise UsageError(f"{name} = {getattr(self, name)} must be {wanted}")

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0

    @property
    def takes_likeliest(self) -> bool:
        """Whether the token of the highest logit is all that there is to find."""
        return self.is_greedy and self.repetition_penalty == 1 and self.logprobs is None


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
    shares = torch.softmax(logits.double() / sampling.temperature, -1)
    if sampling.min_p > 0:
        shares = shares * (shares >= sampling.min_p * shares.amax(-1, keepdim=True))
    if sampling.top_p < 1:
        before = shares.cumsum(-1) - shares
        shares = shares * (before < sampling.top_p * shares.sum(-1, keepdim=True))
    return ids, shares

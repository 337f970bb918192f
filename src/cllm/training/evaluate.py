"""Loss, perplexity and bits per byte of a packed text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice

import torch
from torch import Tensor

from cllm.model.norms import BatchNorm
from cllm.text.batches import IGNORED, evaluation_windows
from cllm.text.packed import PackedTokens


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Over all scored tokens of a text: ``loss`` in nats per token, ``bpb`` in bits per byte of text."""

    loss: float
    bpb: float
    perplexity: float
    tokens: int
    bytes: int

    def to_json(self) -> dict[str, float | int]:
        """As plain values."""
        return asdict(self)


SummedLoss = Callable[[Tensor, Tensor], Tensor]
"""(ids, targets), each (B, T), to the summed loss in nats."""


def evaluate(
    summed_loss: SummedLoss,
    tokens: PackedTokens,
    *,
    context: int,
    batch_size: int,
    device: str = "cpu",
    advance: Callable[[float], None] = lambda windows: None,
) -> Evaluation:
    """Score every byte of ``tokens`` exactly once, in disjoint windows of ``context`` tokens.

    The bits of end tokens count; they have no bytes. ``advance`` is told of each batch's windows.
    """
    nats = 0.0
    for ids, targets in evaluation_windows(tokens, context, batch_size):
        nats += _one(summed_loss, ids, targets, device)
        advance(ids.shape[0])
    loss = nats / tokens.scored_tokens
    return Evaluation(
        loss=loss,
        bpb=nats / math.log(2) / max(tokens.scored_bytes, 1),
        perplexity=math.exp(min(loss, 700.0)),
        tokens=tokens.scored_tokens,
        bytes=tokens.scored_bytes,
    )


def norm_mode_gap(
    model: torch.nn.Module,
    summed_loss: SummedLoss,
    tokens: PackedTokens,
    *,
    context: int,
    batch_size: int,
    device: str,
    batches: int = 8,
) -> float:
    """Loss with batch norm in eval mode minus that in training mode, in nats per token.

    It uses running averages in the one and the batch's own statistics in the other. All else stays in
    eval mode; the first ``batches`` that no padding fills are scored (the first one in any case).
    """
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    full = (len(tokens) - 1) // (context * batch_size)
    difference, count = 0.0, 0
    windows = evaluation_windows(tokens, context, batch_size)
    was_training = model.training
    model.eval()
    try:
        for ids, targets in islice(windows, min(batches, max(full, 1))):
            for mode, sign in ((False, 1.0), (True, -1.0)):
                for norm in norms:
                    norm.train(mode)
                difference += sign * _one(summed_loss, ids, targets, device)
            count += int((targets != IGNORED).sum())
    finally:
        model.train(was_training)
    return difference / max(count, 1)


def _one(summed_loss: SummedLoss, ids: object, targets: object, device: str) -> float:
    tensors = (torch.as_tensor(values).to(device) for values in (ids, targets))
    return float(summed_loss(*tensors))

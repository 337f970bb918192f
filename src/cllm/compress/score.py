"""Bits per byte of a model as its run scores it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch

from cllm.core.config import Config
from cllm.model.cross_entropy import cross_entropy_sum
from cllm.model.transformer import Transformer
from cllm.text.packed import PackedTokens
from cllm.training.choose import DTYPES
from cllm.training.evaluate import Evaluation, evaluate


def score(
    model: Transformer,
    config: Config,
    tokens: PackedTokens,
    advance: Callable[[float], None] = lambda windows: None,
) -> Evaluation:
    """Score ``tokens`` in the run's precision; ``advance`` is told of each batch's windows."""
    train, context = config.train, config.model.context
    # Parameters alone are cast: rotary tables and running averages stay exact, as in training.
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES.get(train.dtype, torch.float32))
    chunk = train.loss_chunk if isinstance(train.loss_chunk, int) else 0

    def summed_loss(ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            hidden = model.output.contract(model.hidden(ids).flatten(0, 1))
            return cross_entropy_sum(hidden, model.output.core(), targets.flatten(), chunk)

    return evaluate(
        summed_loss, tokens, context=context, batch_size=train.batch_size, advance=advance
    )

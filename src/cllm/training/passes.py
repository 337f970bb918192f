"""A word of advice to who is about to train on a short text many times over."""

from __future__ import annotations

from cllm.core.config import Config

DROPOUT_FROM = ((8, 0.1), (20, 0.2))
"""Passes over the training split from which on a dropout was best (``docs/results/embed.md``: texts of 1 to
2.5 MB, read 4 to 32 times)."""


def advice(config: Config, tokens: int) -> str | None:
    """What dropout would help training on ``tokens`` so often; ``None`` where it is set or not needed."""
    model, train = config.model, config.train
    if model.embedding_dropout or model.residual_dropout or model.attention_dropout:
        return None
    seen = train.steps * train.batch_size * train.accumulate * model.context
    passes = seen / max(tokens, 1)
    best = max((dropout for least, dropout in DROPOUT_FROM if passes >= least), default=None)
    if best is None:
        return None
    return (
        f"the training text will be read {passes:,.0f} times, and learnt by heart: held-out text is likely "
        f"to do better with --set model.embedding_dropout={best:g} --set model.residual_dropout={best:g}"
    )

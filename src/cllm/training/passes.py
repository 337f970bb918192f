"""A word of advice to who is about to train on a short text many times over."""

from __future__ import annotations

from cllm.core.config import Config

DROPOUT_FROM = ((8, 0.1), (20, 0.2))
"""Passes over the training split from which on a dropout was best (``docs/results/embed.md``: texts of 1 to
2.5 MB, read 4 to 32 times)."""


def advice(config: Config, tokens: int) -> str | None:
    """What to say of the dropout that was best where a text of ``tokens`` is read so often.

    ``None`` where one is set, or where none was better.
    """
    model = config.model
    if model.embedding_dropout or model.residual_dropout or model.attention_dropout:
        return None
    passes = config.tokens_seen / tokens
    best = max((dropout for least, dropout in DROPOUT_FROM if passes >= least), default=None)
    if best is None:
        return None
    return (
        f"the training text will be read {passes:,.0f} times; texts that were read so often scored better "
        f"with --set model.embedding_dropout={best:g} --set model.residual_dropout={best:g}"
    )

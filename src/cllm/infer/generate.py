"""Token by token generation with a key/value cache of the model's context."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from cllm.core.errors import UserError
from cllm.infer.lookup.head import IndexHead
from cllm.infer.sampling import Sampling, choose_token
from cllm.model.attention import KeyValueCache
from cllm.model.transformer import Transformer


class NonFiniteLogitsError(UserError):
    """The model's logits are not finite: its weights are damaged, or its training diverged."""


def generate(
    model: Transformer,
    ids: Sequence[int],
    sampling: Sampling,
    *,
    end_id: int | None = None,
    head: IndexHead | None = None,
) -> list[int]:
    """New token ids after ``ids``; stops after ``max_tokens`` or before ``end_id``.

    ``head`` stands in for the model's output table, where the vocabulary is large (``IndexHead``).
    """
    return list(stream(model, ids, sampling, end_id=end_id, head=head))


def stream(
    model: Transformer,
    ids: Sequence[int],
    sampling: Sampling,
    *,
    end_id: int | None = None,
    head: IndexHead | None = None,
) -> Iterator[int]:
    """The tokens of ``generate`` one at a time.

    When the context is full, generation goes on from its second half, read anew, so that positions stay
    those that the model was trained on. Raises ``UserError`` for an empty prompt and
    ``NonFiniteLogitsError`` for logits that are not finite.
    """
    if not len(ids):
        raise UserError("the prompt has no tokens; give at least one (the end token begins a text)")
    context, device = model.config.context, model.embedding.weight.device
    generator = torch.Generator().manual_seed(sampling.seed)
    seen = list(ids)
    cache, unread = _fresh(model, seen[-context:])
    was_training = model.training
    model.eval()
    try:
        for _ in range(sampling.max_tokens):
            if cache.length + len(unread) > context:
                cache, unread = _fresh(model, seen[-max(context // 2, 1) :])
            with torch.no_grad():
                hidden = model.hidden(torch.tensor([unread], device=device), cache)
                scored = hidden[0, -1:] if head else model.output.logits(hidden[0, -1:])
            if not bool(torch.isfinite(scored).all()):
                raise NonFiniteLogitsError(
                    "the model's logits are not finite; its weights are damaged"
                )
            choose = head.choose if head else choose_token
            token = choose(scored[0], sampling, generator)
            if token == end_id:
                return
            yield token
            seen.append(token)
            unread = [token]
    finally:
        model.train(was_training)


def _fresh(model: Transformer, ids: list[int]) -> tuple[KeyValueCache, list[int]]:
    return KeyValueCache(model.config, 1, model.embedding.weight), ids

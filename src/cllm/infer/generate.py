"""Token by token generation: what stands before the engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from cllm.infer.batching import Request, serve
from cllm.infer.engine import Engine, EngineOptions
from cllm.infer.request import NonFiniteLogitsError
from cllm.infer.sampling import Sampling
from cllm.model.transformer import Transformer

if TYPE_CHECKING:  # an index brings scipy along, which generation seldom needs
    from cllm.infer.lookup.head import IndexHead

__all__ = ["NonFiniteLogitsError", "generate", "stream"]


def generate(
    model: Transformer | Engine,
    ids: Sequence[int],
    sampling: Sampling,
    *,
    end_id: int | None = None,
    head: IndexHead | None = None,
    tokens: int | None = None,
) -> list[int]:
    """New token ids after ``ids``; stops after ``max_tokens`` or before ``end_id``.

    ``head`` stands in for the model's output table, where the vocabulary is large (``IndexHead``).
    ``tokens``: how many the tokenizer has, if the table may have more rows (``EngineOptions``). An
    ``Engine`` that is kept saves making one for each call. Stop strings need the text: see ``Writer``.
    """
    return list(stream(model, ids, sampling, end_id=end_id, head=head, tokens=tokens))


def stream(
    model: Transformer | Engine,
    ids: Sequence[int],
    sampling: Sampling,
    *,
    end_id: int | None = None,
    head: IndexHead | None = None,
    tokens: int | None = None,
) -> Iterator[int]:
    """The tokens of ``generate`` one at a time.

    When the context is full, generation goes on from its second half, read anew, so that positions stay
    those that the model was trained on. Raises ``UserError`` for an empty prompt and
    ``NonFiniteLogitsError`` for logits that are not finite.
    """
    if isinstance(model, Engine):
        assert head is None, "an engine has its head already"
        assert tokens is None, "and knows its tokens"
        engine = model
    else:
        engine = Engine(model, EngineOptions(tokens=tokens), head=head)
    for step in serve(engine, [Request(ids, sampling)], end_id=end_id):
        if step.token is not None:
            yield step.token

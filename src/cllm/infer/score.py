"""The log-likelihood of texts, whole or after a prompt."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from cllm.core.errors import UserError
from cllm.infer.engine import Engine
from cllm.infer.request import NonFiniteLogitsError
from cllm.infer.writing import prompt_ids
from cllm.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Score:
    """``logprob`` is in nats; ``greedy`` tells whether each token was the likeliest."""

    logprob: float
    tokens: int
    bytes: int
    greedy: bool

    @property
    def bpb(self) -> float:
        """Bits per byte."""
        return -self.logprob / math.log(2) / self.bytes

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        body = {"logprob": self.logprob, "bpb": self.bpb, "tokens": self.tokens}
        return body | {"bytes": self.bytes, "greedy": self.greedy}


def score(engine: Engine, tokenizer: Tokenizer, text: str, prompt: str | None = None) -> Score:
    """The log-likelihood of ``text`` behind an end token, or behind ``prompt``.

    A text longer than the engine's capacity is cut into windows that do not overlap, as by ``cllm eval``;
    behind a prompt they are counted from the text's end, so that it has as much before it as there is room
    for. Each token is scored once; no end token is. Prompt and text are encoded apart. Raises ``UserError``
    for an empty text or one that is no UTF-8, and ``NonFiniteLogitsError``.
    """
    if not text:
        raise UserError("an empty text has no likelihood; give at least one character")
    before = prompt_ids(tokenizer, prompt or "")
    ids = before + prompt_ids(tokenizer, text)[1:]
    first, capacity = len(before), engine.capacity
    logprob, greedy = 0.0, True
    inputs = len(ids) - 1
    ends = (
        range(inputs, first - 1, -capacity)
        if prompt
        else range(capacity, inputs + capacity, capacity)
    )
    for end in ends:
        begin, end = max(end - capacity, 0), min(end, inputs)
        scored = max(begin, first - 1)  # ids[scored] is the first whose successor counts
        found, likeliest = _window(engine, ids[begin : end + 1], scored - begin)
        logprob, greedy = logprob + found, greedy and likeliest
    return Score(logprob, len(ids) - first, len(text.encode()), greedy)


@torch.no_grad()
def _window(engine: Engine, ids: list[int], first: int) -> tuple[float, bool]:
    """Log-likelihood of ``ids[first + 1:]`` given what is before each, and whether all are likeliest."""
    given = torch.tensor(ids, device=engine.device)
    hidden = engine.network.hidden(given[:-1])[first:]
    total, likeliest = 0.0, True
    for part, targets in zip(hidden.split(256), given[first + 1 :].split(256), strict=True):
        logits = engine.network.logits(part).float()
        chosen = logits.log_softmax(-1).gather(1, targets[:, None])
        total += float(chosen.double().sum())
        likeliest = likeliest and bool((logits.argmax(-1) == targets).all())
    if not math.isfinite(total):
        raise NonFiniteLogitsError("the model's logits are not finite; its weights are damaged")
    return total, likeliest

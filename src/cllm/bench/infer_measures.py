"""What all contestants of ``cllm bench infer`` do alike: the same ids, and rounds of the same calls."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from cllm.bench.harness import answer_rounds
from cllm.core.memory import peak_rss

PROMPT, BATCH, PREFILL = 16, 32, 512
"""Tokens before the first that is written, texts at once, and tokens that are read at once."""

Measures = dict[str, tuple[int, Callable[[], object]]]
"""Name of a figure: tokens of one call, and the call."""


def prompts(vocab: int) -> np.ndarray:
    """(BATCH, PROMPT) token ids."""
    return np.random.default_rng(1).integers(0, vocab, (BATCH, PROMPT))


def whole_texts(vocab: int, context: int) -> np.ndarray:
    """(texts, context) ids, PREFILL tokens in all, or one text where the context is longer."""
    shape = (max(PREFILL // context, 1), min(context, PREFILL))
    return np.random.default_rng(2).integers(0, vocab, shape)


def seconds(call: Callable[[], object]) -> float:
    """How long one call takes."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def fastest(calls: dict[str, Callable[[], object]], repeats: int = 3) -> str:
    """The key of the call that is fastest, each once for warming up and then ``repeats`` times."""
    found = {}
    for name, call in calls.items():
        call()
        found[name] = min(seconds(call) for _ in range(repeats))
    return min(found, key=lambda name: found[name])


def answer(make: Callable[[], Measures], facts: Callable[[], dict[str, Any]] = dict) -> None:
    """Make the calls ready and warm, then answer rounds with tokens a second.

    ``facts`` are asked for when all is ready, and stand in the first answer.
    """
    begin = time.perf_counter()
    measures = make()
    for _, call in measures.values():
        call()
    ready = {"start_seconds": time.perf_counter() - begin} | facts()

    def one_round() -> dict[str, Any]:
        figures: dict[str, Any] = {
            name: tokens / seconds(call) for name, (tokens, call) in measures.items()
        }
        return figures | {"peak_rss": peak_rss()}

    answer_rounds(ready, one_round)

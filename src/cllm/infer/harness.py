"""A model for EleutherAI's lm-eval harness (an extra), so that its standard tasks run on ours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from cllm.core.errors import require
from cllm.infer.engine import Engine
from cllm.infer.sampling import Sampling
from cllm.infer.score import score
from cllm.infer.writing import Prompt, write_all
from cllm.text.tokenizer import Tokenizer

DEFAULT_TOKENS = 256
"""Tokens of an answer where the task sets no limit."""


class Asked(Protocol):
    """What the harness asks with: ``lm_eval.api.instance.Instance``."""

    args: tuple[Any, ...]


class HarnessAnswers:
    """The three questions of the harness; of a long prompt as much of its end is read as fits."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.engine, self.tokenizer = engine, tokenizer

    def loglikelihood(self, requests: Sequence[Asked]) -> list[tuple[float, bool]]:
        """For each (context, continuation): the continuation's log-likelihood in nats, and whether greedy
        decoding would have written it."""
        found = []
        for request in requests:
            context, continuation = request.args[:2]
            scored = score(self.engine, self.tokenizer, continuation, context or None)
            found.append((scored.logprob, scored.greedy))
        return found

    def loglikelihood_rolling(self, requests: Sequence[Asked]) -> list[float]:
        """For each (text,): its log-likelihood in nats, over windows that do not overlap."""
        return [score(self.engine, self.tokenizer, r.args[0]).logprob for r in requests]

    def generate_until(self, requests: Sequence[Asked]) -> list[str]:
        """For each (context, settings): what is written until one of ``settings["until"]``."""
        prompts = (_prompt(*request.args[:2]) for request in requests)
        found = dict(write_all(self.engine, self.tokenizer, prompts))
        return [found[index].text for index in range(len(requests))]


def _prompt(context: str, settings: dict[str, Any]) -> Prompt:
    until: Iterable[str] = settings.get("until") or ()
    if isinstance(until, str):
        until = (until,)
    drawn = bool(settings.get("do_sample", float(settings.get("temperature") or 0) > 0))
    sampling = Sampling(
        max_tokens=int(settings.get("max_gen_toks") or DEFAULT_TOKENS),
        temperature=float(settings.get("temperature") or 1.0) if drawn else 0.0,
        top_k=int(settings.get("top_k") or 0),
        top_p=float(settings.get("top_p") or 1.0),
        stop=tuple(text for text in until if text),
    )
    return Prompt(context, sampling)


def harness_model(engine: Engine, tokenizer: Tokenizer) -> Any:
    """A model to hand to ``lm_eval.simple_evaluate(model=…, tasks=[…])``.

    Raises ``UserError`` if lm-eval is not installed.
    """
    library = require("lm_eval.api.model", "lm-eval", "evaluation by the lm-eval harness")

    class HarnessModel(HarnessAnswers, library.LM):  # type: ignore[name-defined]
        """Ours as theirs."""

    return HarnessModel(engine, tokenizer)

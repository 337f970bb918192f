"""Text to text: prompts in, completions out, over the engine's tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from cllm.infer.batching import Request, Step, serve
from cllm.infer.constrain import Format, constraint_of
from cllm.infer.engine import Engine
from cllm.infer.request import Sampling, prompt_ids
from cllm.infer.streaming import TextStream
from cllm.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prompt:
    """A text to go on from; ``form`` is what the output must match."""

    text: str
    sampling: Sampling = field(default_factory=Sampling)
    form: Format | None = None


@dataclass(frozen=True)
class Completion:
    """What was written after a prompt.

    ``reason``: why it ended, see ``Step``. ``tokens`` are all that were made, those of a stop text as well.
    ``unread``: tokens at the prompt's beginning that the engine had no room for.
    """

    text: str
    tokens: tuple[int, ...]
    reason: str
    prompt_tokens: int
    unread: int = 0
    logprobs: tuple[tuple[float, tuple[tuple[int, float], ...]], ...] | None = None
    """For each token its log-probability (nats) and the likeliest (id, log-probability)."""

    def to_json(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """As JSON values; tokens of log-probabilities have the names that the tokenizer's file has."""
        body: dict[str, Any] = {
            "text": self.text,
            "reason": self.reason,
            "prompt_tokens": self.prompt_tokens,
            "tokens": len(self.tokens),
        }
        if self.unread:
            body["unread_prompt_tokens"] = self.unread
        if self.logprobs is not None:
            body["logprobs"] = [
                {
                    "token": tokenizer.token_name(token),
                    "id": token,
                    "logprob": logprob,
                    "top": [
                        {"token": tokenizer.token_name(other), "id": other, "logprob": value}
                        for other, value in top
                    ],
                }
                for token, (logprob, top) in zip(self.tokens, self.logprobs, strict=True)
            ]
        return body


def write(engine: Engine, tokenizer: Tokenizer, prompt: Prompt) -> Iterator[str]:
    """What comes after one prompt, piece by piece, never a character cut in two."""
    text = TextStream(tokenizer, prompt.sampling.stop)
    shown: list[str] = []
    request = _request(tokenizer, prompt, text, shown)
    for _ in serve(engine, [request], end_id=tokenizer.end_id):
        if shown:
            yield "".join(shown)
            shown.clear()
    rest = text.end()
    if rest:
        yield rest


def write_all(
    engine: Engine, tokenizer: Tokenizer, prompts: Iterable[Prompt]
) -> Iterator[tuple[int, Completion]]:
    """Completions of all prompts with their numbers, each as soon as it is there.

    As many are written at once as the engine has slots; prompts are taken as they are needed.
    """
    writings: dict[int, _Writing] = {}

    def requests() -> Iterator[Request]:
        for index, prompt in enumerate(prompts):
            writing = _Writing(TextStream(tokenizer, prompt.sampling.stop))
            request = _request(tokenizer, prompt, writing.stream, writing.shown)
            writing.prompt_tokens = len(request.ids)
            writing.wants_logprobs = prompt.sampling.logprobs is not None
            writings[index] = writing
            yield request

    for step in serve(engine, requests(), end_id=tokenizer.end_id):
        writing = writings[step.index]
        if step.token is None:
            yield step.index, writing.finish(step.reason, engine.capacity)
            del writings[step.index]
        else:
            writing.take(step)


class _Writing:
    """A completion in the making."""

    def __init__(self, stream: TextStream) -> None:
        self.stream, self.shown = stream, list[str]()
        self.tokens: list[int] = []
        self.logprobs: list[tuple[float, tuple[tuple[int, float], ...]]] = []
        self.prompt_tokens = 0
        self.wants_logprobs = False

    def take(self, step: Step) -> None:
        assert step.token is not None
        self.tokens.append(step.token)
        if step.logprob is not None:
            self.logprobs.append((step.logprob, step.top))

    def finish(self, reason: str, capacity: int) -> Completion:
        text = "".join(self.shown) + self.stream.end()
        return Completion(
            text,
            tuple(self.tokens),
            reason,
            self.prompt_tokens,
            max(self.prompt_tokens - capacity, 0),
            tuple(self.logprobs) if self.wants_logprobs else None,
        )


def _request(tokenizer: Tokenizer, prompt: Prompt, text: TextStream, shown: list[str]) -> Request:
    def done(token: int) -> bool:
        piece = text.feed(token)
        if piece:
            shown.append(piece)
        return text.stopped

    constraint = None if prompt.form is None else constraint_of(prompt.form, tokenizer)
    return Request(prompt_ids(tokenizer, prompt.text), prompt.sampling, done, constraint)

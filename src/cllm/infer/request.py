"""What is asked of generation, and what may go wrong with it. Nothing here needs torch."""

from __future__ import annotations

from dataclasses import dataclass

from cllm.core.errors import UsageError, UserError
from cllm.text.tokenizer import Tokenizer

BURST = 8
"""Tokens that are written in one call where the loop is compiled: a text shows so many at once."""
MOST_LOGPROBS = 100
"""Alternatives that may be asked for at each token."""


class NonFiniteLogitsError(UserError):
    """The model's logits are not finite: its weights are damaged, or its training diverged."""


def refuse_unless(finite: bool) -> None:
    """Raises ``NonFiniteLogitsError``."""
    if not finite:
        raise NonFiniteLogitsError("the model's logits are not finite; its weights are damaged")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn.

    ``temperature`` 0 takes the likeliest; ``top_k`` 0, ``top_p`` 1, ``min_p`` 0 and ``repetition_penalty``
    1 are off. ``stop``: texts before which the output ends. ``logprobs``: alternatives to report with
    each token's log-probability; none reports nothing.
    """

    max_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        checks = {
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            "top_k": (self.top_k >= 0, "0 (off) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "in 0 (off) … 1"),
            "repetition_penalty": (
                0 < self.repetition_penalty < float("inf"),
                "above 0; 1 is off",
            ),
            "seed": (0 <= self.seed < 2**63, "in 0 … 2⁶³ − 1"),
            "stop": (all(self.stop), "texts that are not empty"),
            "logprobs": (
                self.logprobs is None or 0 <= self.logprobs <= MOST_LOGPROBS,
                f"in 0 … {MOST_LOGPROBS}",
            ),
        }
        for name, (holds, wanted) in checks.items():
            if not holds:
                raise UsageError(f"{name} = {getattr(self, name)} must be {wanted}")

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0

    @property
    def takes_likeliest(self) -> bool:
        """Whether the token of the highest logit is all that there is to find."""
        return self.is_greedy and self.repetition_penalty == 1 and self.logprobs is None


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """A prompt's tokens behind an end token, which begins a text, as in training.

    Raises ``UserError`` for text that has no UTF-8 form (half a surrogate pair: bytes that were not UTF-8).
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            "the prompt is not valid UTF-8 text; save or pass it in that encoding"
        ) from error
    return [tokenizer.end_id, *map(int, tokenizer.encode(text))]

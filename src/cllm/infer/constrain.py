"""Output that must match a regular expression or a JSON schema, by the package llguidance (an extra)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from cllm.core.errors import UsageError, UserError, require
from cllm.text.tokenizer import Tokenizer

_KNOWN: WeakKeyDictionary[Tokenizer, Any] = WeakKeyDictionary()


@dataclass(frozen=True)
class Format:
    """What an output must be: ``kind`` ``regex`` with a pattern, or ``json`` with a JSON schema's text.

    Patterns are those of Rust's regex crate and match the whole output; schemas are what llguidance knows.
    """

    kind: str
    text: str


class Matcher:
    """A text that grows token by token and matches a ``Format``, or can still come to match it."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def allowed(self) -> Tensor:
        """(V,) bool: the tokens that may come next; the end token where the text is a whole one."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise UserError(f"the format cannot be followed: {_line(self._matcher.get_error())}")
        return torch.from_numpy(np.unpackbits(bits, bitorder="little")[: self._vocab_size]).bool()

    def accept(self, token: int) -> bool:
        """Take a token that was allowed; True when nothing more may follow."""
        self._matcher.consume_token(token)
        return bool(self._matcher.is_stopped())


def constraint_of(form: Format, tokenizer: Tokenizer) -> Matcher:
    """A matcher at the beginning of a text.

    Raises ``UserError`` if llguidance is not installed and ``UsageError`` for a format that it refuses.
    """
    library = require("llguidance", "constrain", "output that matches a format")
    if form.kind == "regex":
        grammar = library.LLMatcher.grammar_from_regex(form.text)
    elif form.kind == "json":
        try:
            json.loads(form.text)
            grammar = library.LLMatcher.grammar_from_json_schema(
                form.text,
                # Free white space is where a small model loses itself.
                overrides={"whitespace_flexible": False},
            )
        except ValueError as error:
            raise UsageError(f"the JSON schema is not valid: {_line(error)}") from error
    else:
        raise UsageError(f"a format is 'regex' or 'json', not {form.kind!r}")
    if tokenizer not in _KNOWN:
        _KNOWN[tokenizer] = library.LLTokenizer(
            library.TokenizerWrapper(_Vocabulary(tokenizer)), n_vocab=tokenizer.vocab_size
        )
    matcher = library.LLMatcher(_KNOWN[tokenizer], grammar, log_level=0)
    if matcher.is_error():
        raise UsageError(f"the {form.kind} is not valid: {_line(matcher.get_error())}")
    return Matcher(matcher, tokenizer.vocab_size)


def _line(text: object) -> str:
    return " ".join(str(text).split())[:300]


class _Vocabulary:
    """A tokenizer as llguidance wants to see it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.end_id
        self.bos_token_id = tokenizer.end_id
        self.special_token_ids = sorted(tokenizer.special_ids)
        self.tokens = [
            # llguidance marks a special token by a byte that no UTF-8 text has.
            b"\xff" + tokenizer.token_name(i).encode()
            if i in tokenizer.special_ids
            else tokenizer.token_bytes(i)
            for i in range(tokenizer.vocab_size)
        ]

    def __call__(self, text: str) -> list[int]:
        return [int(i) for i in self._tokenizer.encode(text)]

"""A tokenizer as GGUF holds it, and the name under which llama.cpp knows how it cuts text into words."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from cllm.core.errors import UserError
from cllm.text.tokenizer import Tokenizer

PRE_TOKENIZERS: dict[str, str] = {
    # The one that `cllm tokenizer train` makes: GPT-2's pattern, inside of ByteLevel.
    json.dumps({"type": "ByteLevel", "use_regex": True}): "gpt-2",
}
"""What decides how text is cut, and llama.cpp's name (``tokenizer.ggml.pre``) for the same. A test
compares the tokens of random texts."""


class TokenType(IntEnum):
    """``tokenizer.ggml.token_type``."""

    NORMAL = 1
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5


@dataclass(frozen=True)
class Vocabulary:
    """``tokenizer.ggml.*``."""

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    end_id: int


def vocabulary(tokenizer: Tokenizer, size: int) -> Vocabulary:
    """The tokenizer of a model with ``size`` rows; rows without a token are named and unused.

    Raises ``UserError`` where llama.cpp would cut text otherwise or take tokens otherwise.
    """
    description: dict[str, Any] = json.loads(tokenizer.to_json())
    pre = _pre_tokenizer(description)
    if description["model"].get("ignore_merges"):
        raise UserError(
            "gguf cannot hold this tokenizer: it takes whole words before it merges (ignore_merges), "
            f"and llama.cpp's {pre!r} does not; export to hf"
        )
    tokens = [f"[unused {i}]" for i in range(size)]
    types = [TokenType.UNUSED] * size
    for name, index in description["model"]["vocab"].items():
        tokens[index], types[index] = name, TokenType.NORMAL
    for token in description["added_tokens"]:
        if token.get("single_word"):
            raise UserError(
                f"gguf cannot hold this tokenizer: its token {token['content']!r} stands for a single "
                "word only, and llama.cpp has no such rule; export to hf"
            )
        kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        tokens[token["id"]], types[token["id"]] = token["content"], kind
    merges = [f"{left} {right}" for left, right in tokenizer.merges()]
    return Vocabulary(pre, tokens, [int(kind) for kind in types], merges, tokenizer.end_id)


def _pre_tokenizer(description: dict[str, Any]) -> str:
    given = description["pre_tokenizer"]
    steps = list(given["pretokenizers"]) if given["type"] == "Sequence" else [given]
    what = [
        {k: v for k, v in step.items() if k not in ("add_prefix_space", "trim_offsets")}
        for step in steps
    ]
    key = json.dumps(what[0] if len(what) == 1 else what)
    if key not in PRE_TOKENIZERS:
        raise UserError(
            "gguf cannot hold this tokenizer: llama.cpp is not known to cut text as its pre-tokenizer "
            f"does ({', '.join(step['type'] for step in steps)}); export to hf or onnx"
        )
    return PRE_TOKENIZERS[key]

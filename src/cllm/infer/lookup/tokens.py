"""The tokens closest to a token or a vector by a model's table, with their texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cllm.core.errors import UsageError
from cllm.infer.lookup.index import TokenIndex
from cllm.text.code_pieces import label
from cllm.text.token_number import token_number
from cllm.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Neighbour:
    """A token close to what was asked for: its text (U+FFFD for bytes that are none), its bytes in
    hexadecimal, and ``score`` as in ``Nearest``."""

    id: int
    text: str
    bytes: str
    score: float


def token_of(tokenizer: Tokenizer, word: str) -> int:
    """The one token that ``word`` is, as it stands or behind a space, or is named, or has the number
    ``#123``.

    Raises ``UsageError`` if it is none or several, with the pieces.
    """
    number = token_number(word, tokenizer.vocab_size)
    if number is not None:
        return number
    named = {tokenizer.token_name(i): i for i in tokenizer.special_ids}
    if word in named:
        return named[word]
    for text in (word, f" {word}") if word else ():
        ids = tokenizer.encode(text)
        if len(ids) == 1:
            return int(ids[0])
    pieces = ", ".join(repr(tokenizer.decode([i])) for i in tokenizer.encode(word))
    raise UsageError(
        f"{word!r} is no single token ({pieces or 'it is empty'}); give one of its tokens, "
        "or an id as '#123'"
    )


def token_neighbours(
    table: Any, tokenizer: Tokenizer, wanted: int | np.ndarray, k: int, metric: str
) -> list[Neighbour]:
    """The k tokens closest to a token (itself left out) or a vector (D,), the closest first, exactly.

    Raises ``ValueError`` for what ``TokenIndex.build`` and ``.query`` refuse, and for k beyond the tokens
    that there are.
    """
    # A scan: an index that serves one query would cost more than it saves.
    index = TokenIndex.build(table, plain=True)
    if isinstance(wanted, np.ndarray):
        if wanted.size != index.shape[1]:
            raise ValueError(
                f"a vector of shape {wanted.shape} does not fit a table of shape {index.shape};"
                f" give one vector of {index.shape[1]} numbers"
            )
        found = index.query(wanted.reshape(1, -1), k, metric)
        itself = -1
    else:
        if not 1 <= k < index.shape[0]:
            raise ValueError(f"k must be in 1…{index.shape[0] - 1} (the other tokens), got {k}")
        itself = wanted
        found = index.query(index.vector(itself), k + 1, metric)
    pairs = zip(found.ids[0].tolist(), found.scores[0].tolist(), strict=True)
    return [_neighbour(tokenizer, token, score) for token, score in pairs if token != itself][:k]


def _neighbour(tokenizer: Tokenizer, token: int, score: float) -> Neighbour:
    text = tokenizer.decode([token]) or tokenizer.token_name(token)
    return Neighbour(token, text, tokenizer.token_bytes(token).hex(" "), score)


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token for display: a literal of its text or bytes, or the name of a special one."""
    return label(tokenizer.token_name(token), tokenizer.token_bytes(token))

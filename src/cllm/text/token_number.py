"""A token by its number, as ``#123``."""

from __future__ import annotations

from cllm.core.errors import UsageError

LONGEST = 20
"""Characters from which on a number is no token's; Python refuses to read thousands of digits."""


def token_number(text: str, size: int) -> int | None:
    """The 123 of ``#123``; ``None`` for text that is no number.

    Raises ``UsageError`` for a number that no token of a vocabulary of ``size`` has.
    """
    if not (text.startswith("#") and text[1:].isdecimal() and len(text) < LONGEST):
        return None
    token = int(text[1:])
    if token >= size:
        raise UsageError(f"there is no token {text}: ids are 0 to {size - 1}")
    return token

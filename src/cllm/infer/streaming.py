"""Tokens to text as they come, without ever showing half a character."""

from __future__ import annotations

import codecs

from cllm.text.tokenizer import Tokenizer


class TextStream:
    """Feeds tokens in, gives whole characters out.

    Bytes that can no longer become a character come out as U+FFFD, as Python's decoder has it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """The characters that ``token`` completes, perhaps none."""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def end(self) -> str:
        """What is left of an unfinished character, as U+FFFD."""
        return self._decoder.decode(b"", final=True)

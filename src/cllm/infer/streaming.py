"""Tokens to text as they come, without ever showing half a character or part of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from cllm.text.tokenizer import Tokenizer


class TextStream:
    """Feeds tokens in, gives whole characters out, up to the ``stop`` text that is complete first.

    Bytes that can no longer become a character come out as U+FFFD, as Python's decoder has it. What may
    yet turn out to be the beginning of a stop text is held back.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False
        """Whether a stop text was found; nothing comes out any more."""

    def feed(self, token: int) -> str:
        """The characters that ``token`` makes certain, perhaps none."""
        return self._show(self._decoder.decode(self._tokenizer.token_bytes(token)))

    def end(self) -> str:
        """What was held back: the beginning of no stop text after all, and half a character as U+FFFD."""
        shown = self._show(self._decoder.decode(b"", final=True))
        if not self.stopped:
            shown, self._held = shown + self._held, ""
        return shown

    def _show(self, characters: str) -> str:
        if self.stopped:
            return ""
        text = self._held + characters
        found = [
            (text.find(stop) + len(stop), text.find(stop)) for stop in self._stop if stop in text
        ]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        certain = len(text) - max((_begun(text, stop) for stop in self._stop), default=0)
        self._held = text[certain:]
        return text[:certain]


def _begun(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` that ``stop`` begins with."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)

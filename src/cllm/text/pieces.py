"""Reading segments of the spool as pieces of bounded size."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from cllm.text.hashing import derive, mix64
from cllm.text.spool import Spool

PIECE = 1 << 14
"""Bytes of a piece for encoding: small, so that all threads share one long document."""
SAMPLE_PIECE = 1 << 16
"""Bytes of a piece of the sample that the tokenizer is trained on."""
_BETWEEN_WORDS = re.compile(rb"(?<=[A-Za-z0-9])(?= [A-Za-z0-9])")
_BEFORE_SPACE = re.compile(rb"(?<=[^\s])(?=[ \t\r\n])")
_LOOKED_AT = 2048


def cut_piece(data: bytes) -> int:
    """Where to end a piece of UTF-8 ``data`` so that the tokens are those of the uncut text.

    The pre-tokenizer patterns of GPT-2 and its successors match no further than the end of a word that
    a space follows, and look at nothing before it. Text without spaces is cut between characters.
    """
    tail = max(0, len(data) - _LOOKED_AT)
    for pattern in (_BETWEEN_WORDS, _BEFORE_SPACE):
        for start in (tail, 0):
            if places := [m.start() for m in pattern.finditer(data, start) if m.start()]:
                return places[-1]
    return trimmed_end(data)


def trimmed_end(data: bytes) -> int:
    """The end of the last whole character of ``data`` (all of it if that leaves nothing)."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 != 0x80:
            width = 1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(data) if width <= back else len(data) - back
    return len(data)


def pieces(spool: Spool, start: int, end: int, size: int = PIECE) -> Iterator[bytes]:
    """The bytes [start, end) of the corpus in pieces of at most ``size`` (at least 4), whole UTF-8
    each, cut where tokens end."""
    while start < end:
        data = spool.read(start, min(end, start + size))
        if start + len(data) < end:
            data = data[: cut_piece(data)]
        yield data
        start += len(data)


def sample(spool: Spool, segments: np.ndarray, limit: int, seed: int) -> Iterator[bytes]:
    """At most ``limit`` bytes of the segments, in order: all of them, or pieces drawn by the
    seed; whole UTF-8 each."""
    starts, ends = _grid(segments, SAMPLE_PIECE)
    sizes = ends - starts
    order = np.argsort(mix64(np.arange(len(starts)), derive("sample", seed)), kind="stable")
    taken = np.sort(order[sizes[order].cumsum() <= limit]) if sizes.sum() > limit else None
    for index in range(len(starts)) if taken is None else taken.tolist():
        data = spool.read(int(starts[index]), int(ends[index]))
        head = next((i for i, byte in enumerate(data[:4]) if byte & 0xC0 != 0x80), 0)
        if whole := data[head : trimmed_end(data)]:
            yield whole


def _grid(segments: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends of the ranges of at most ``size`` bytes that segments are made of."""
    lengths = segments[:, 2] - segments[:, 1]
    counts = -(-lengths // size)
    owner = np.repeat(np.arange(len(segments)), counts)
    number = np.arange(len(owner)) - np.repeat(counts.cumsum() - counts, counts)
    starts = segments[owner, 1] + number * size
    return starts, np.minimum(starts + size, segments[owner, 2])

"""Words and shingles of UTF-8 text as arrays of hashes, for comparing texts.

A word is a run of ASCII letters and digits, case folded, or one other character, so that scripts
without spaces are compared as well; everything between words is ignored. A shingle is a run of five
words (Broder 1997, "On the resemblance and containment of documents").
"""

from __future__ import annotations

from functools import cache

import numpy as np

from cllm.text.hashing import derive, mix64

WIDTH = 5
"""Words of a shingle."""
_OTHER, _ALNUM, _LEAD, _TRAIL = range(4)
_BASE = np.uint64(derive("word") | 1)


@cache
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """Class and folded value of each byte (0 for what is in no word)."""
    kind = np.full(256, _OTHER, dtype=np.uint8)
    for first, last in (("0", "9"), ("A", "Z"), ("a", "z")):
        kind[ord(first) : ord(last) + 1] = _ALNUM
    kind[0x80:0xC0], kind[0xC0:] = _TRAIL, _LEAD
    value = np.arange(256, dtype=np.uint64)
    value[ord("A") : ord("Z") + 1] += 32
    value[kind == _OTHER] = 0
    return kind, value


def words(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """(start bytes int64, hashes uint64) of the words of ``data``, in order."""
    kinds, values = _tables()
    data_bytes = np.frombuffer(data, dtype=np.uint8)
    kind = kinds[data_bytes]
    begins = kind == _LEAD
    alnum = kind == _ALNUM
    begins |= alnum & ~np.concatenate([[False], alnum[:-1]])
    starts = np.flatnonzero(begins)
    if not len(starts):
        return starts, np.zeros(0, dtype=np.uint64)
    # A polynomial in an odd base modulo 2^64, from the word's own first byte on.
    word = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(data)))
    exponents = np.arange(starts[0], len(data)) - starts[word]
    longest = int(exponents.max()) + 1
    powers = np.cumprod(np.full(longest, _BASE, dtype=np.uint64))
    terms = values[data_bytes[starts[0] :]] * powers[exponents]
    return starts, mix64(np.add.reduceat(terms, starts - starts[0]), derive("words"))


def shingles(hashes: np.ndarray) -> np.ndarray:
    """(words - 4,) uint64 hashes of the runs of five words; empty for fewer words."""
    count = max(0, len(hashes) - WIDTH + 1)
    total = np.zeros(count, dtype=np.uint64)
    for j in range(WIDTH):
        total += hashes[j : j + count] * np.uint64(derive("shingle", j) | 1)
    return mix64(total, derive("shingles"))


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """Exact resemblance |A ∩ B| / |A ∪ B| of two arrays of shingles, as sets."""
    a, b = np.unique(first), np.unique(second)
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / max(1, len(a) + len(b) - both)

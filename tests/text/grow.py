"""Write a large corpus: words with Zipf-like frequencies, and new ones without end (one in fifty), as
in natural text, where the vocabulary never stops growing.

Run as a script: ``python grow.py FILE BYTES``; the text is the same for the same size.
"""

import sys
from pathlib import Path

import numpy as np

WORDS = 60_000


def vocabulary(rng: np.random.Generator) -> np.ndarray:
    """Pronounceable words of one to five syllables."""
    onsets = np.array(["b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "st", "tr"])
    vowels = np.array(["a", "e", "i", "o", "u", "ai", "ou"])
    syllables = np.char.add(rng.choice(onsets, (5, WORDS)), rng.choice(vowels, (5, WORDS)))
    word = syllables[0]
    for k in range(1, 5):
        word = np.where(rng.random(WORDS) < 0.6, np.char.add(word, syllables[k]), word)
    return word.astype(object)


def grow(path: Path, size: int) -> None:
    """At least ``size`` bytes, a blank line about every hundred words."""
    rng = np.random.default_rng(0)
    words = vocabulary(rng)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        while file.tell() < size:
            ranks = np.minimum(rng.zipf(1.3, 200_000) - 1, WORDS - 1)
            text = words[ranks]
            fresh = rng.integers(ord("a"), ord("z") + 1, (4_000, 9), dtype=np.uint8)
            text[::50] = fresh.view("S9").ravel().astype(str).astype(object)
            text[99::100] += ".\n\n"
            file.write(" ".join(text.tolist()))


if __name__ == "__main__":
    grow(Path(sys.argv[1]), int(sys.argv[2]))

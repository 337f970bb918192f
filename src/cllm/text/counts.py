"""How often each token occurs in a packed text."""

from __future__ import annotations

import numpy as np

from cllm.text.packed import PackedTokens

_BLOCK = 1 << 22


def count_tokens(tokens: PackedTokens, vocab_size: int) -> np.ndarray:
    """How often each token occurs: (V,) int64, read block by block.

    Raises:
        ValueError: an id beyond the vocabulary.
    """
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(tokens), _BLOCK):
        found = np.bincount(tokens.ids[start : start + _BLOCK], minlength=vocab_size)
        if len(found) > vocab_size:
            raise ValueError(
                f"the corpus holds token {len(found) - 1}, the vocabulary ends at {vocab_size - 1}: "
                "count a corpus that this tokenizer encoded"
            )
        counts += found
    return counts

"""Tokens counted block by block."""

from __future__ import annotations

import numpy as np
import pytest

from cllm.text import counts
from cllm.text.counts import count_tokens
from cllm.text.packed import PackedTokens


@pytest.mark.parametrize("block", [1, 3, 100])
def test_tokens_are_counted_over_all_blocks(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counts, "_BLOCK", block)
    tokens = PackedTokens.from_arrays(np.array([0, 1, 2, 2, 5, 1, 0]), text_bytes=5)
    assert count_tokens(tokens, 7).tolist() == [2, 2, 2, 0, 0, 1, 0]
    with pytest.raises(ValueError, match="holds token 5, the vocabulary ends at 3"):
        count_tokens(tokens, 4)

"""A small tokenizer and small corpora for the tests of this floor."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cllm.text.document import Document
from cllm.text.packed import PackedTokens
from cllm.text.spool import Spool
from cllm.text.tokenizer import Tokenizer

SENTENCES = [
    "The quick brown fox jumps over the lazy dog; the dog doesn't mind.\n",
    "Ein naïver Café-Besucher grüßt: 日本語 и русский текст, 12345 Zeichen.\n\n",
    "def add(a, b):\n    return a + b  # it's the sum\n",
]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """350 tokens, trained on a few sentences; ``<|pad|>`` is a second special token."""
    return Tokenizer.train(SENTENCES * 20, 350, ["<|pad|>"])


@pytest.fixture(scope="session")
def spool_of() -> Callable[[list[Document]], Spool]:
    """Makes a frozen spool of documents, in memory."""

    def make(documents: list[Document]) -> Spool:
        spool = Spool(io.BytesIO(), io.BytesIO())
        for document in documents:
            spool.add(document)
        spool.freeze()
        return spool

    return make


@pytest.fixture(scope="session")
def essay() -> Callable[[int, int], str]:
    """Makes (seed, words) texts of random words, unlike each other."""

    def make(seed: int, words: int) -> str:
        rng = np.random.default_rng(seed)
        letters = rng.integers(ord("a"), ord("z") + 1, size=(words, 6)).astype(np.uint8)
        text = [bytes(row[: 3 + i % 4]).decode("ascii") for i, row in enumerate(letters)]
        for i in range(11, words, 12):
            text[i] += ".\n"
        return " ".join(text).replace("\n ", "\n") + "\n"

    return make


@pytest.fixture(scope="session")
def stream() -> Callable[..., PackedTokens]:
    """Makes a packed stream in memory of ``tokens`` tokens 1, 2, 3, … between end tokens 0."""

    def make(tokens: int, mask: np.ndarray | None = None) -> PackedTokens:
        ids = np.concatenate([[0], np.arange(1, tokens + 1), [0]])
        return PackedTokens.from_arrays(ids, text_bytes=4 * tokens, mask=mask)

    return make


@pytest.fixture
def real_data() -> Path:
    """The directory of real texts that lies beside a checkout; the test skips where it does not."""
    place = Path(__file__).parents[3] / "shared" / "data"
    if not place.is_dir():
        pytest.skip("no real texts beside this checkout")
    return place

"""Token ids to look up: of real text, and drawn by Zipf's law where no text fills the vocabulary."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cllm.core.config import DataConfig, TokenizerConfig
from cllm.text.builtin import language_reference
from cllm.text.corpus import prepare
from cllm.text.tokenizer import Tokenizer

WINDOW = 128


@dataclass(frozen=True, eq=False)
class Stream:
    """``ids`` (N,) int64 below ``vocab_size``, and how often each token occurs in all, (V,)."""

    label: str
    ids: np.ndarray
    counts: np.ndarray

    @property
    def vocab_size(self) -> int:
        """Rows of the table."""
        return len(self.counts)


def zipf_stream(size: int, disorder: float, count: int, seed: int = 0) -> Stream:
    """``count`` ids of a vocabulary whose r-th token has a frequency as 1/r (Zipf 1949).

    Token i's rank is its place after log(i + 1) is disturbed by a normal deviate times ``disorder``.
    """
    rng = np.random.default_rng(seed)
    noisy = np.log(np.arange(1, size + 1)) + disorder * rng.standard_normal(size)
    token_of_rank = np.argsort(noisy)
    weights = 1 / np.arange(1, size + 1)
    edges = np.cumsum(weights / weights.sum())
    ranks = np.searchsorted(edges, rng.random(count)).clip(max=size - 1)
    counts = np.empty(size)
    counts[token_of_rank] = weights
    return Stream("Zipf", token_of_rank[ranks], counts)


def text_streams(
    paths: tuple[str, ...], sizes: tuple[int, ...], count: int, quick: bool
) -> tuple[list[Stream], float]:
    """Shuffled windows of a text's training split, for each size of vocabulary that the text fills, and
    the disorder (see ``disorder``) of the first."""
    if quick:
        texts = [text for _, text in language_reference()][:40]
        tokenizer = Tokenizer.train(texts, 512)
        ids = np.concatenate(tokenizer.encode_batch(texts))
        return [_windows("language reference", ids, tokenizer.vocab_size, count)], 1.0
    label = Path(paths[0]).name if paths else "built-in text"
    streams: list[Stream] = []
    first: float | None = None
    for size in sizes:
        settings = TokenizerConfig(vocab_size=size, order="tokenizer")
        with tempfile.TemporaryDirectory() as place:
            data = DataConfig(paths=paths, near_duplicates="off")
            found = prepare(data, settings, Path(place) / "data", seed=0, context=WINDOW)
            if found.tokenizer.vocab_size < size and streams:
                break  # a size that the text does not fill says nothing new
            ids = np.array(found.train.ids)
        streams.append(_windows(label, ids, found.tokenizer.vocab_size, count))
        first = disorder(streams[0].counts) if first is None else first
    assert first is not None
    return streams, first


def disorder(counts: np.ndarray) -> float:
    """How far ids are from frequency order: the standard deviation of log(rank) - log(id + 1), each
    token weighted by its occurrences ``counts`` (V,)."""
    rank = np.empty(len(counts))
    rank[np.argsort(-counts, kind="stable")] = np.arange(1, len(counts) + 1)
    away = np.log(rank) - np.log(np.arange(1, len(counts) + 1))
    mean = np.average(away, weights=counts)
    return float(np.sqrt(np.average((away - mean) ** 2, weights=counts)))


def _windows(label: str, ids: np.ndarray, size: int, count: int) -> Stream:
    counts = np.bincount(ids, minlength=size)
    windows = ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW)
    rng = np.random.default_rng(0)
    take = rng.integers(len(windows), size=count // WINDOW)
    return Stream(label, windows[take].reshape(-1).astype(np.int64), counts)

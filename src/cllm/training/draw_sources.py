"""From a run's tokenizer and text to what its steps draw from (``cllm.training.draws``)."""

from __future__ import annotations

import numpy as np

from cllm.core.config import Config
from cllm.core.errors import UsageError
from cllm.text.counts import count_tokens
from cllm.text.dataset import Dataset
from cllm.text.merge_tree import MergeTree
from cllm.text.token_codes import TokenCodes
from cllm.training.candidates import Sampler, log_uniform, unigram
from cllm.training.draws import Draws
from cllm.training.neighbours import Neighbours
from cllm.training.progress import Progress
from cllm.training.similarity import PairSource


def draws_of(config: Config, dataset: Dataset, progress: Progress) -> Draws:
    """What ``config.train`` has drawn; counts of tokens are those of the training split.

    Raises ``UsageError`` where codes are asked for and the tokenizer has no merges.
    """
    train, size = config.train, config.model.vocab_size
    assert size is not None
    sampled, pulled = train.loss == "sampled", train.similarity.weight > 0
    if not sampled and not pulled:
        return Draws()
    counts = count_tokens(dataset.train, size)
    lengths = {}
    if sampled and train.sampled.sampler == "divisor":
        lengths["train.sampled.sampler = 'divisor'"] = train.sampled.neighbours
    if pulled:
        lengths["train.similarity.weight"] = train.similarity.neighbours
    near = _neighbours(lengths, dataset, counts, progress) if lengths else None
    pairs = None
    if pulled:
        assert near is not None
        mine = near.first(train.similarity.neighbours)
        pairs = PairSource(mine, train.similarity.pairs, train.seed)
    return Draws(_sampler(config, counts, near) if sampled else None, pairs)


def _sampler(config: Config, counts: np.ndarray, near: Neighbours | None) -> Sampler:
    sampled = config.train.sampled
    chances = {
        "uniform": lambda: np.full(len(counts), 1 / len(counts)),
        "log-uniform": lambda: log_uniform(counts),
        "unigram": lambda: unigram(counts),
        "divisor": lambda: unigram(counts),
    }
    known, share = None, 0.0
    if sampled.sampler == "divisor":
        assert near is not None
        known, share = near.first(sampled.neighbours), sampled.share
    return Sampler(sampled.candidates, chances[sampled.sampler](), config.train.seed, known, share)


def _neighbours(
    lengths: dict[str, int], dataset: Dataset, counts: np.ndarray, progress: Progress
) -> Neighbours:
    """Lists as long as the longest asked for."""
    try:
        tree = MergeTree.from_tokenizer(dataset.tokenizer)
        codes = TokenCodes.build(tree, counts[: len(tree)])
    except ValueError as error:
        raise UsageError(
            f"{' and '.join(lengths)} compares tokens by their codes: {error}"
        ) from error
    with progress.stage("comparing the tokens' codes", len(codes)) as advance:
        return Neighbours.of(codes, max(lengths.values()), len(counts), advance)

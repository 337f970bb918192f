"""The start of a new run's token tables where it is more than random: ``model.embedding.init``."""

from __future__ import annotations

import torch

from cllm.core.config import Config
from cllm.model.corpus_start import corpus_table
from cllm.model.crystal_start import crystal_table, merge_pieces
from cllm.model.transformer import Transformer
from cllm.text.cooccurrence import cooccurrence, harmonic_weights, token_counts
from cllm.text.dataset import Dataset
from cllm.training.pieces import incidence_of
from cllm.training.progress import Progress

WINDOW = 4
"""Places on each side that count as a token's context."""


def start_tables(config: Config, dataset: Dataset, model: Transformer, progress: Progress) -> None:
    """Give the model's tables the start that ``config.model.embedding.init`` asks for, from the training
    split alone. A head of its own begins with the same table as the input."""
    embedding = config.model.embedding
    if embedding.is_composed:
        model.set_incidence(incidence_of(dataset.tokenizer, config))
    if embedding.init == "normal":
        return
    assert config.model.vocab_size is not None
    size, width = config.model.vocab_size, config.model.d_model
    with progress.stage("reading the corpus's statistics"):
        if embedding.init == "corpus":
            weights = harmonic_weights(WINDOW)
            following = cooccurrence(dataset.train, size, weights, say=progress.say)
            seed = config.train.seed
            table = corpus_table(following, width, std=embedding.start_std, seed=seed)
        else:
            counts = token_counts(dataset.train, size)
            pieces = merge_pieces(dataset.tokenizer, size)
            table = crystal_table(pieces, counts, width, std=embedding.start_std)
    for part in (model.embedding, model.head):
        if part is not None:
            part.set_table(torch.from_numpy(table))

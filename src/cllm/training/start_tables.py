"""The start of a new run's token tables where it is more than random: ``model.embedding.init``."""

from __future__ import annotations

import numpy as np
import torch

from cllm.core.config import Config
from cllm.core.errors import UsageError
from cllm.model.bigram_start import start_bigram
from cllm.model.corpus_start import corpus_table
from cllm.model.crystal_start import crystal_table
from cllm.model.transformer import Transformer
from cllm.text.cooccurrence import cooccurrence, harmonic_weights
from cllm.text.counts import count_tokens
from cllm.text.dataset import Dataset
from cllm.text.merge_tree import MergeTree
from cllm.text.token_codes import TokenCodes
from cllm.training.pieces import incidence_of
from cllm.training.progress import Progress

WINDOW = 4
"""Places on each side that count as a token's context."""
MOSTLY = 0.9
"""Share of coordinates on zero from which a lattice is said to be coarse."""


def start_tables(config: Config, dataset: Dataset, model: Transformer, progress: Progress) -> None:
    """Give the model the start that ``config.model.embedding.init`` asks for, from the training split.

    A head of its own begins with the same table as the input. With ``"corpus"`` the last MLP begins
    with the corpus's bigrams, too. Raises ``UsageError`` for a tokenizer without merges where pieces are
    asked for, and for a lattice that is too fine or too coarse for the start.
    """
    if config.model.embedding.is_composed:
        model.set_incidence(incidence_of(dataset.tokenizer, config))
    init, std = config.model.embedding.init, config.model.embedding.start_std
    if init == "normal":
        _check_points(config, model, progress)
        return
    assert config.model.vocab_size is not None
    tokens, size, width = dataset.train, config.model.vocab_size, config.model.d_model
    with progress.stage("reading the corpus's statistics"):
        counts = count_tokens(tokens, size)
        if init == "crystal":
            try:
                tree = MergeTree.from_tokenizer(dataset.tokenizer)
                codes = TokenCodes.build(tree, counts[: len(tree)])
            except ValueError as error:
                raise UsageError(f"model.embedding.init = 'crystal': {error}") from error
            _set(config, model, crystal_table(codes, size, width, std=std), progress)
            return
        near, *further = harmonic_weights(WINDOW)
        bigrams = cooccurrence(tokens, size, (near,), say=progress.say)
        following = bigrams + cooccurrence(tokens, size, (0.0, *further), say=progress.say)
        table = corpus_table(following, counts, width, std=std, seed=config.train.seed)
        _set(config, model, table, progress)
        if not start_bigram(model, bigrams):
            progress.say("only the tables start from the corpus: batch norm hides the rest")


def _set(config: Config, model: Transformer, table: np.ndarray, progress: Progress) -> None:
    for part in (model.embedding, model.head):
        if part is not None:
            part.set_table(torch.from_numpy(table))
    _check_points(config, model, progress)


def _check_points(config: Config, model: Transformer, progress: Progress) -> None:
    """Raises ``UsageError`` for a lattice too fine for floats, or on which all of a table rounds to zero
    (without learned positions no gradient leads away from there); warns where nearly all does."""
    if config.model.embedding.lattice == "none":
        return
    step = f"model.embedding.lattice_step = {config.model.embedding.lattice_step:g}"
    with torch.no_grad():
        for name, table in model.tables.items():
            core = table.core()
            if not bool(core.isfinite().all()):
                raise UsageError(
                    f"{step} is too fine: floats do not resolve so many steps; raise it"
                )
            zeros = float((core == 0).float().mean())
            if zeros == 1.0:
                raise UsageError(
                    f"{step} is too coarse: all of the {name} begins at 0, where nothing tells "
                    "tokens apart; lower it"
                )
            if zeros > MOSTLY:
                progress.warn(f"{step} is coarse: {zeros:.1%} of the {name} begins at 0")

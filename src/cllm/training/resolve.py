"""What a training begins with: its text as tokens, and a configuration that leaves nothing open."""

from __future__ import annotations

from pathlib import Path

from cllm.core.config import Config
from cllm.core.cpu import is_busy
from cllm.core.errors import UsageError
from cllm.core.machine import cache_dir
from cllm.core.settings import merge
from cllm.text.corpus import prepare
from cllm.text.dataset import Dataset
from cllm.text.tokenizer import Tokenizer
from cllm.training.choose import choose
from cllm.training.pieces import resolve_pieces
from cllm.training.progress import Progress, as_one


def read_text(
    config: Config, directory: Path, progress: Progress, *, reuse: Tokenizer | None = None
) -> Dataset:
    """The text of ``config.data`` as tokens of its tokenizer (or of ``reuse``), kept in ``directory``."""
    with progress.stage("preparing the corpus", 100) as advance:
        return prepare(
            config.data,
            config.tokenizer,
            directory,
            seed=config.train.seed,
            context=config.model.context,
            reuse=reuse,
            cache=cache_dir() / "data",
            say=progress.say,
            progress=as_one(advance),
        )


def resolve(
    config: Config, dataset: Dataset, progress: Progress, *, seconds: float | None = None
) -> Config:
    """The configuration with vocabulary and machine settled; each choice is told.

    ``seconds``: a time budget. Raises ``UsageError`` for a vocabulary that the tokenizer is too large for.
    """
    size = dataset.tokenizer.vocab_size
    if config.model.vocab_size is None:
        config = merge(config, {"model.vocab_size": size})
    elif config.model.vocab_size < size:
        raise UsageError(
            f"model.vocab_size = {config.model.vocab_size} is smaller than the tokenizer's {size}; "
            "leave it out"
        )
    if config.model.embedding.is_composed:
        config = resolve_pieces(config, dataset.tokenizer)
    choices = choose(config, seconds=seconds)
    busy = is_busy()
    if busy:
        progress.warn(f"{busy}: training will be slower than this machine can do")
    for line in choices.lines():
        progress.say(line)
    for line in choices.warnings:
        progress.warn(line)
    return choices.config

"""A model with weights that were kept: what a run's readers make of its configuration and checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from cllm.core.errors import UserError
from cllm.core.model_config import ModelConfig
from cllm.model.transformer import Transformer


def restored(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    path: Path | str,
    attention: str = "matmul",
) -> Transformer:
    """The model of ``config`` with ``weights``, in eval mode.

    Raises ``UserError``, naming the ``path`` that both are of, where they do not fit together.
    """
    try:
        _check_resolved(config)
        model = Transformer(config, attention)
        model.load_state_dict(weights)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the weights and the configuration of {path} do not fit together: one was altered; bring back "
            "what it was"
        ) from error
    return model.eval()


def _check_resolved(config: ModelConfig) -> None:
    """Raises ``ValueError`` where a number is missing that training has filled in."""
    needed = {"vocab_size": config.vocab_size}
    if config.embedding.is_composed:
        needed |= {"pieces": config.embedding.pieces, "nonzeros": config.embedding.nonzeros}
    missing = [name for name, number in needed.items() if number is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} not known")

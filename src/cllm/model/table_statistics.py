"""What a model does with its token table on its training text: final hidden states and frequencies."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from cllm.model.transformer import Transformer
from cllm.text.batches import IGNORED, evaluation_windows
from cllm.text.counts import count_tokens
from cllm.text.packed import PackedTokens


@dataclass(frozen=True, kw_only=True)
class TableStatistics:
    """``moment`` (D, D) = E[hhᵀ] of final hidden states; ``frequency`` (V,) of each token."""

    moment: np.ndarray
    frequency: np.ndarray


def table_statistics(
    model: Transformer, tokens: PackedTokens, *, limit: int = 32_768, batch_size: int = 16
) -> TableStatistics:
    """Hidden states of the first ``limit`` tokens or so, without dropout, and counts of all tokens.

    Take training text: what is measured here decides what is stored, so held-out text must not.
    """
    width, context = model.config.d_model, model.config.context
    device, was_training = next(model.parameters()).device, model.training
    moment, count = np.zeros((width, width)), 0
    model.eval()
    with torch.no_grad():
        for ids, targets in evaluation_windows(tokens, context, batch_size):
            hidden = model.hidden(torch.as_tensor(ids).to(device)).flatten(0, 1).cpu()
            used = hidden[torch.as_tensor(targets).flatten() != IGNORED].double().numpy()
            moment += used.T @ used
            count += len(used)
            if count >= limit:
                break
    model.train(was_training)
    assert model.config.vocab_size is not None
    frequency = count_tokens(tokens, model.config.vocab_size)
    return TableStatistics(moment=moment / max(count, 1), frequency=frequency)

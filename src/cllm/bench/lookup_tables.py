"""Tables and queries for the bench of look-ups: made ones, and a run's."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def clustered_table(V: int, D: int, seed: int = 0) -> np.ndarray:
    """A table (V, D) float32 shaped as trained ones are, roughly.

    V/64 clusters with Zipf's weights; centres and the rows about them are normal with variances 1/i in
    the i-th principal direction; 36% of the variance is within clusters. Directions are rotated at
    random, lengths multiplied by exp(0.2·normal).
    """
    g = np.random.default_rng(seed)
    deviations = (np.arange(1, D + 1) ** -0.5).astype(np.float32)
    deviations /= np.linalg.norm(deviations)
    clusters = max(V // 64, 8)
    weights = 1 / np.arange(1, clusters + 1)
    centres = 0.8 * deviations * g.standard_normal((clusters, D), dtype=np.float32)
    labels = g.choice(clusters, V, p=weights / weights.sum())
    rotation = np.linalg.qr(g.standard_normal((D, D)))[0].astype(np.float32)
    table = np.empty((V, D), dtype=np.float32)
    for start in range(0, V, 1 << 16):
        part = slice(start, start + (1 << 16))
        rows = g.standard_normal((len(labels[part]), D), dtype=np.float32)
        rows *= 0.6 * deviations
        rows += centres[labels[part]]
        rows *= np.exp(0.2 * g.standard_normal((len(rows), 1), dtype=np.float32))
        table[part] = rows @ rotation
    return table


def noisy_rows(table: np.ndarray, count: int, seed: int = 1) -> np.ndarray:
    """Queries (count, D): rows drawn at random, each with noise of half its length in a random
    direction of all D dimensions."""
    g = np.random.default_rng(seed)
    rows = table[g.integers(len(table), size=count)].copy()
    noise = g.standard_normal(rows.shape, dtype=np.float32)
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    rows += 0.5 * np.linalg.norm(rows, axis=1, keepdims=True) * noise
    return rows


def table_and_hidden_vectors(run: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The output table of a run and hidden vectors (count, D) of its held-out text, normed, as they meet
    the table. Raises ``UserError`` if there is no run, or it has no validation split."""
    import torch

    from cllm.core.errors import UserError
    from cllm.core.settings import load_config
    from cllm.model.restored import restored
    from cllm.store.checkpoint import load_weights
    from cllm.store.run import RunDirectory
    from cllm.text.dataset import load_prepared

    directory = RunDirectory.open(run)
    config = load_config(directory.config)
    tokens = load_prepared(directory.data).validation
    if tokens is None:
        raise UserError(f"{run} has no validation split to take hidden vectors from")
    model, context = restored(config.model, load_weights(run), run), config.model.context
    hidden: list[torch.Tensor] = []
    for start in range(0, len(tokens) - context, context):
        ids = torch.from_numpy(np.asarray(tokens.ids[start : start + context]).astype(np.int64))
        with torch.no_grad():
            hidden.append(model.hidden(ids[None])[0].float())
        if sum(map(len, hidden)) >= count:
            break
    if not hidden:
        raise UserError(f"{run}: its validation split is shorter than one context of {context}")
    return model.output.table().detach().float().numpy(), torch.cat(hidden)[:count].numpy()

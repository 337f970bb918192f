"""A short recovery: what rounding took is partly given back by training what the file can still vary.

Scales, offsets and norms, and by a straight-through estimator the codes themselves, are trained to have
the compressed model predict what the full one predicts (distillation, Hinton, Vinyals & Dean 2015).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from cllm.compress.divergence import Judge, batch_windows
from cllm.compress.layer import Piece
from cllm.compress.learned import RATES, Learned, learned
from cllm.core.errors import UserError
from cllm.model.transformer import Transformer
from cllm.text.batches import BatchSource
from cllm.text.packed import PackedTokens
from cllm.training.progress import Progress

HELD = 32
"""Windows that only judge which state is kept."""
LOOKS = 8
"""How often they judge."""


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """What training gave.

    ``pieces``: all weights, the trained ones as the best state has them. ``before``, ``after``:
    divergence from the full model on windows held out, nats a token; ``step``: of the best state, 0 if
    none was better than the start.
    """

    pieces: dict[str, Piece]
    before: float
    after: float
    step: int


def recovery_windows(
    tokens: PackedTokens, context: int, steps: int, *, seed: int = 0
) -> np.ndarray:
    """(windows, context) int64 for ``steps`` steps, none for 0: those of ``calibration_windows`` and more
    like them, each once as far as the text reaches; the first of them judge.

    Raises ``UserError`` for a text shorter than two windows.
    """
    if not steps:
        return np.zeros((0, context), dtype=np.int64)
    source = BatchSource(tokens, context, 1, seed)
    count = min(HELD + steps * batch_windows(context), source.windows_per_epoch)
    if count < 2:
        raise UserError("recovery needs two windows of text at least; give more (--calibration)")
    return np.concatenate([source.batch(index)[0] for index in range(count)])


def recover(
    full: Transformer,
    model: Transformer,
    pieces: Mapping[str, Piece],
    windows: np.ndarray,
    progress: Progress,
    *,
    steps: int,
    rounding: bool = True,
) -> Recovery:
    """``steps`` steps of Adam on the divergence KL(full ‖ compressed) of the next token.

    ``model`` holds the values of ``pieces``, and is not changed. ``windows`` (W, T): the first of them
    judge, eight times, and the best state is kept; the start is one of them. ``rounding``: codes on
    fixed grids may move. The same input gives the same bits on the same machine and threads.
    """
    full, model = full.eval(), model.eval()
    weights = full.state_dict()
    trained = {
        name: found
        for name, piece in pieces.items()
        if (found := learned(piece, weights[name], rounding=rounding)) is not None
    }
    held = min(HELD, max(1, len(windows) // 5))
    judging = Judge(full, model, torch.as_tensor(windows[:held]))
    text = torch.as_tensor(windows[held:])
    optimizer = _optimizer(trained)
    best = before = judging.divergence({name: found.values() for name, found in trained.items()})
    kept, best_step = dict(pieces), 0
    batch = batch_windows(windows.shape[1])
    look = max(1, steps // LOOKS)
    with progress.stage("recovering", steps) as advance:
        for step in range(1, steps + 1):
            _pace(optimizer, step, steps)
            picked = torch.arange((step - 1) * batch, step * batch) % len(text)
            values = {name: found.values() for name, found in trained.items()}
            optimizer.zero_grad()
            _pull(full, model, values, text[picked])
            optimizer.step()
            advance(1)
            if step % look and step != steps:
                continue
            # Judged are the numbers that the file would hold.
            now = {name: found.piece() for name, found in trained.items()}
            value = judging.divergence({name: piece.values for name, piece in now.items()})
            if value < best:
                best, best_step, kept = value, step, dict(pieces) | now
    return Recovery(pieces=kept, before=before, after=best, step=best_step)


def _optimizer(trained: Mapping[str, Learned]) -> torch.optim.Adam:
    leaves: dict[str, list[Tensor]] = {kind: [] for kind in RATES}
    for found in trained.values():
        for kind, tensors in found.parameters().items():
            leaves[kind] += tensors
    groups = [
        {"params": tensors, "lr": RATES[kind], "rate": RATES[kind]}
        for kind, tensors in leaves.items()
        if tensors
    ]
    return torch.optim.Adam(groups, betas=(0.9, 0.95))


def _pace(optimizer: torch.optim.Adam, step: int, steps: int) -> None:
    """A linear start over a twentieth of the steps, then half a cosine down to 0."""
    warm = max(1, steps // 20)
    share = step / warm if step <= warm else 0.5 + 0.5 * math.cos(math.pi * (step - warm) / steps)
    for group in optimizer.param_groups:
        group["lr"] = share * group["rate"]


def _pull(full: Transformer, model: Transformer, values: Mapping[str, Tensor], ids: Tensor) -> None:
    """Add the gradient of the divergence to what ``values`` depend on. That in the logits is what the
    model predicts less what the full one does, and the divergence itself is not needed."""
    logits = functional_call(model, dict(values), (ids,))
    with torch.no_grad():
        gradient = logits.softmax(dim=-1).sub_(full(ids).softmax(dim=-1))
        gradient /= gradient.shape[0] * gradient.shape[1]
    logits.backward(gradient)

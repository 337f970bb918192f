"""A trained run, opened to be compressed: its weights, calibration text, and what errors cost."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cllm.compress.calibration import calibration_windows
from cllm.compress.output_metric import OutputMetric, output_metrics
from cllm.compress.recovery import recovery_windows
from cllm.compress.score import score
from cllm.compress.settings import Settings
from cllm.core.config import Config
from cllm.core.errors import UserError
from cllm.core.machine import machine
from cllm.core.settings import load_whole
from cllm.model.restored import restored
from cllm.model.transformer import Transformer
from cllm.store import checkpoint as checkpoints
from cllm.store.run import RunDirectory
from cllm.text.corpus import tokens_for_eval
from cllm.text.dataset import Dataset, load_prepared
from cllm.text.packed import PackedTokens
from cllm.training.progress import Progress


@dataclass(frozen=True, eq=False)
class Source:
    """A trained run, opened to be compressed.

    ``digest``: SHA-256 of its weights' names and bytes. ``base``: bits per byte of its validation text,
    ``None`` where there is none.
    """

    run: RunDirectory
    config: Config
    weights: dict[str, Tensor]
    step: int
    data: Dataset
    windows: np.ndarray
    recovery: np.ndarray
    """(windows, context): text to recover on, none where no recovery was asked for."""
    digest: str
    base: float | None
    outputs: dict[str, OutputMetric] = field(default_factory=dict)
    """What errors in layers' outputs cost, once that was asked for."""

    def model(self) -> Transformer:
        """A fresh model with the run's weights, in eval mode."""
        return restored(self.config.model, self.weights, self.run.path)

    def output_metrics(self, progress: Progress) -> Mapping[str, OutputMetric]:
        """By layer (see ``cllm.compress.output_metric``), measured once."""
        if not self.outputs:
            self.outputs.update(output_metrics(self.model(), self.windows, progress))
        return self.outputs


def open_source(
    path: Path, settings: Settings, progress: Progress, calibration: Sequence[str] = ()
) -> Source:
    """Open the run (or checkpoint) at ``path`` with calibration text: ``calibration`` or its own training
    split, never what it is scored on.

    Raises ``UserError`` as opening a run, reading its weights and reading text do.
    """
    run = RunDirectory.open(path)
    config = load_whole(run.config)
    checkpoint = checkpoints.load(checkpoints.find_chosen(path), with_optimizer=False)
    data = load_prepared(run.data)
    # A container's quota may be less than its cores; who asked for fewer has a reason.
    torch.set_num_threads(min(torch.get_num_threads(), machine().threads))
    context = config.model.context
    if calibration:
        with tempfile.TemporaryDirectory() as place:
            tokens = tokens_for_eval(
                list(calibration), data.tokenizer, place, field=config.data.field
            )
            windows = calibration_windows(tokens, context, count=settings.tokens)
            recovery = recovery_windows(tokens, context, settings.recover)
    else:
        windows = calibration_windows(data.train, context, count=settings.tokens)
        recovery = recovery_windows(data.train, context, settings.recover)
    digest = hashlib.sha256()
    for name in sorted(checkpoint.weights):
        if not bool(torch.isfinite(checkpoint.weights[name]).all()):
            raise UserError(f"{path}: {name} holds NaN or infinity; compress another checkpoint")
        digest.update(name.encode("utf-8"))
        digest.update(checkpoint.weights[name].contiguous().view(-1).view(torch.uint8).numpy().data)
    source = Source(
        run=run,
        config=config,
        weights=checkpoint.weights,
        step=checkpoint.step,
        data=data,
        windows=windows,
        recovery=recovery,
        digest=digest.hexdigest(),
        base=None,
    )
    base = score_on_validation(source, source.model(), progress, "scoring the run")
    return Source(**{**vars(source), "base": base})


def score_on_validation(
    source: Source, model: Transformer, progress: Progress, name: str
) -> float | None:
    """Bits per byte of the run's validation text; ``None`` where it has none."""
    tokens: PackedTokens | None = source.data.validation
    if tokens is None:
        return None
    windows = -(-(len(tokens) - 1) // source.config.model.context)
    with progress.stage(name, windows) as advance:
        return score(model, source.config, tokens, advance).bpb

"""Scoring an exported file, in the program that it is for, on held-out text."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cllm.core.errors import UserError
from cllm.export.check import CheckFailedError, same_tokens
from cllm.export.formats import format_of
from cllm.export.runtime import Runtime
from cllm.export.source import Source, open_source
from cllm.model.transformer import Transformer
from cllm.store.container import is_container
from cllm.store.run import RunDirectory
from cllm.text.batches import IGNORED
from cllm.text.corpus import tokens_for_eval
from cllm.text.dataset import load_prepared
from cllm.text.packed import PackedTokens
from cllm.training.evaluate import Evaluation, evaluate

THRESHOLD = 0.01
"""Bits per byte that an exported file may be worse than its run."""
BATCH = 8
"""Windows scored at once."""


@dataclass(frozen=True)
class Verified:
    """Bits per byte of the same text by the file and by its run."""

    path: Path
    runtime: str
    file: Evaluation
    run: Evaluation
    threshold: float

    @property
    def rise(self) -> float:
        """How much worse the file is, in bits per byte."""
        return self.file.bpb - self.run.bpb

    @property
    def holds(self) -> bool:
        """Whether the rise is within the threshold; a NaN is not."""
        return self.rise <= self.threshold

    def line(self) -> str:
        """What a person wants to know."""
        return (
            f"{self.path} in {self.runtime}: {self.file.bpb:.4f} bits per byte, the run itself "
            f"{self.run.bpb:.4f} ({self.rise:+.4f}; {self.threshold:g} more is allowed) over "
            f"{self.file.bytes:,} bytes"
        )


def verify(
    path: Path | str,
    run: Path | str,
    *,
    data: Sequence[str] = (),
    threshold: float = THRESHOLD,
    advance: Callable[[float], None] = lambda windows: None,
) -> Verified:
    """Score the exported file at ``path`` in its own program, and its run, on the same text.

    ``run`` may be a compressed file. ``data``: files, directories or globs; none means the run's
    validation split. Where the file holds a tokenizer, it must make the run's tokens of that text. Raises
    ``UserError`` for a file that cannot be opened or whose logits are not finite, for other tokens, and
    where there is no held-out text. A rise past ``threshold`` is for the caller to judge:
    ``Verified.holds``.
    """
    source = open_source(Path(run))
    module = format_of(Path(path)).load()
    with (
        tempfile.TemporaryDirectory() as place,
        closing(module.open_runtime(Path(path))) as runtime,
    ):
        if data:
            names = list(data)
            tokens = tokens_for_eval(names, source.tokenizer, place, field=source.data_field)
        elif is_container(run):
            raise UserError(f"{run} has no text of its own: name one with --data")
        else:
            held_out = load_prepared(RunDirectory.open(run).data).validation
            if held_out is None:
                raise UserError(f"{run} has no validation split; name a text with --data")
            tokens = held_out
        _compare_tokens(runtime, source, tokens)
        file = _score(_by_runtime(runtime), tokens, source, advance)
        if not math.isfinite(file.bpb):
            raise CheckFailedError(
                f"{path} gives logits that are not finite in {runtime.name}: its weights were altered; "
                "export anew"
            )
        own = _score(_by_model(source.model), tokens, source, lambda windows: None)
    return Verified(Path(path), runtime.name, file, own, threshold)


def _score(
    loss: Callable[[Tensor, Tensor], Tensor],
    tokens: PackedTokens,
    source: Source,
    advance: Callable[[float], None],
) -> Evaluation:
    context = source.config.context
    return evaluate(loss, tokens, context=context, batch_size=BATCH, advance=advance)


def _by_runtime(runtime: Runtime) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        return _summed(torch.from_numpy(np.asarray(runtime.logits(ids.numpy()))), targets)

    return loss


def _by_model(model: Transformer) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            return _summed(model(ids), targets)

    return loss


def _summed(logits_btv: Tensor, targets_bt: Tensor) -> Tensor:
    return functional.cross_entropy(
        logits_btv.flatten(0, 1).float(),
        targets_bt.flatten(),
        ignore_index=IGNORED,
        reduction="sum",
    )


def _compare_tokens(runtime: Runtime, source: Source, tokens: PackedTokens) -> None:
    """Raise ``UserError`` unless the file's tokenizer makes the tokens of the text's documents."""
    if runtime.encode is None:
        return
    same_tokens(runtime, source)
    if tokens.mask_bits is not None:  # texts with questions are encoded in parts
        return
    ids = np.asarray(tokens.ids)
    ends = np.flatnonzero(ids == source.tokenizer.end_id)
    for first, last in pairwise(ends):
        text = source.tokenizer.decode_bytes(ids[first + 1 : last])
        try:
            theirs = runtime.encode(text.decode("utf-8"))
        except UnicodeDecodeError:  # a document that was cut at the edge of a split
            continue
        if not np.array_equal(theirs, ids[first:last]):
            raise CheckFailedError(
                f"in {runtime.name} a document of {len(text):,} bytes has other tokens than in the run"
            )

"""What a layer sees: H = Σ xxᵀ of its inputs on calibration text, layer by layer through a model.

Layers come in the order in which the model runs, each with inputs that the layers before it, as they are
by then, make: a layer that was compressed hands on its error, and the next one can make up for it. Only
the layer at hand has statistics in memory, beside the hidden vectors between two blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from cllm.compress.moments import add_products, mirrored
from cllm.compress.output_metric import OutputMetric, drawn_to
from cllm.core.errors import UserError
from cllm.model.norms import wide
from cllm.model.transformer import Block, Transformer
from cllm.text.batches import BatchSource
from cllm.text.packed import PackedTokens

HELD_OUT = 0.2
"""Share of the windows that only judge (damping), and decide nothing else."""
WINDOWS_AT_ONCE = 32


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear layer in its turn.

    ``fit`` and ``held`` (n, n) float64: Σ xxᵀ over the windows for fitting and those held out, each over
    its number of tokens, or with each token as heavy as it is salient. ``seen``: of all windows, tokens
    alike. ``outer`` (m, m): what errors in the outputs cost, where that is known. ``linear`` is the layer
    itself, whose weight (m, n) may be replaced now.
    """

    name: str
    linear: nn.Linear
    fit: Tensor
    held: Tensor
    seen: Tensor
    outer: Tensor | None

    @property
    def whole(self) -> Tensor:
        """(n, n): of both parts."""
        return (1 - HELD_OUT) * self.fit + HELD_OUT * self.held


def calibration_windows(
    tokens: PackedTokens, context: int, *, count: int, seed: int = 0
) -> np.ndarray:
    """(windows, context) int64: ``count`` tokens or so of ``tokens`` in windows drawn by ``seed``.

    Raises ``UserError`` for a text shorter than one window.
    """
    source = BatchSource(tokens, context, 1, seed)
    windows = min(max(2, count // context), source.windows_per_epoch)
    return np.concatenate([source.batch(index)[0] for index in range(windows)])


def layers_in_order(model: Transformer) -> list[str]:
    """Names of the linear layers of the blocks, in the order in which they run."""
    return [
        f"layers.{i}.{name}"
        for i, block in enumerate(model.layers)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    ]


def calibrate(
    model: Transformer,
    windows: np.ndarray,
    *,
    skip: Collection[str] = (),
    outputs: Mapping[str, OutputMetric] | None = None,
) -> Iterator[Layer]:
    """Each linear layer of ``model`` in turn, with the statistics of its inputs on ``windows``.

    Layers named in ``skip`` are taken as they are. The caller may replace a layer's weight before it takes
    the next one. ``outputs``: by layer, on the same windows (see ``output_metrics``). Raises ``UserError``
    where an input is not finite, and for fewer than two windows.
    """
    if len(windows) < 2:
        raise UserError("calibration needs two windows of text at least; give more (--calibration)")
    model.eval()
    held = max(1, round(len(windows) * HELD_OUT))
    with torch.no_grad():
        ids = torch.as_tensor(windows)
        hidden = wide(model.embedding.embed(ids))
        length = ids.shape[1]
        rotary = None
        if model.positions is not None:
            hidden = hidden + model.positions[:length]
        else:
            rotary = (model.cos[:length], model.sin[:length])
        for number, module in enumerate(model.layers):
            for half, part, run in _halves(cast(Block, module), rotary):
                for name, linear in part.named_modules(prefix=half):
                    if not isinstance(linear, nn.Linear):
                        continue
                    full = f"layers.{number}.{name}"
                    if full in skip:
                        continue
                    known = None if outputs is None else outputs[full]
                    yield _layer(full, linear, run, (hidden, held), known)
                # In place: the inputs of the next half take the room of this one's.
                for start in range(0, len(hidden), WINDOWS_AT_ONCE):
                    some = hidden[start : start + WINDOWS_AT_ONCE]
                    some.copy_(run(some))


_Run = Callable[[Tensor], Tensor]
"""Hidden vectors (windows, T, D) before a half of a block to those after it."""


def _halves(
    block: Block, rotary: tuple[Tensor, Tensor] | None
) -> list[tuple[str, nn.Module, _Run]]:
    """What runs one after the other in a block: where its layers are, by name, and what it computes."""
    return [
        ("attention", block.attention, lambda hidden: block.attend(hidden, rotary)),
        ("mlp", block.mlp, block.feed),
    ]


def _layer(
    name: str, linear: nn.Linear, run: _Run, inputs: tuple[Tensor, int], known: OutputMetric | None
) -> Layer:
    """``inputs``: hidden vectors of all windows, and how many of them are held out, which come first."""
    hidden, held = inputs
    parts = []
    for some in (slice(held, None), slice(held)):
        weights = None if known is None else known.saliency[some]
        parts.append(_moment(run, linear, hidden[some], name, weights))
    (fit, fit_seen), (judging, held_seen) = parts
    seen = (1 - HELD_OUT) * fit_seen + HELD_OUT * held_seen
    return Layer(name, linear, fit, judging, seen, None if known is None else known.outer)


class _Seen(Exception):  # noqa: N818 - no error, but the end of what has to be computed
    """Raised when the layer's input is there."""


def _moment(
    run: _Run, linear: nn.Linear, hidden: Tensor, name: str, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Means of xxᵀ (n, n) of the inputs of ``linear`` for ``hidden`` (windows, T, D) before ``run``: by
    ``weights`` (windows, T) as well as the tokens tell it, and with all tokens alike."""
    plain = torch.zeros(linear.in_features, linear.in_features, dtype=torch.float64)
    heavy = torch.zeros_like(plain)
    fourth = 0.0
    begin = 0

    def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal fourth
        rows = inputs[0].flatten(0, -2).double()
        add_products(plain, rows)
        if weights is not None:
            mine = weights[begin : begin + WINDOWS_AT_ONCE].flatten().double()
            add_products(heavy, rows, rows * mine[:, None])
            fourth += float((mine * rows.square().sum(dim=1)).square().sum())
        raise _Seen

    handle = linear.register_forward_pre_hook(add)
    try:
        for begin in range(0, len(hidden), WINDOWS_AT_ONCE):
            try:
                run(hidden[begin : begin + WINDOWS_AT_ONCE])
            except _Seen:
                continue
    finally:
        handle.remove()
    count = hidden.shape[0] * hidden.shape[1]
    plain = mirrored(plain) / count
    mean = 0.0 if weights is None else float(weights.double().mean())
    if mean > 0:
        # Where few tokens weigh most, chance is in it: as far as it may be, tokens are alike.
        heavy = drawn_to(mirrored(heavy) / (count * mean), plain, fourth / (count * mean**2), count)
    else:
        heavy = plain
    if not bool(torch.isfinite(plain).all() & torch.isfinite(heavy).all()):
        raise UserError(
            f"the inputs of {name} on the calibration text hold NaN or infinity: the run's weights or "
            "a layer compressed before are damaged"
        )
    return heavy, plain

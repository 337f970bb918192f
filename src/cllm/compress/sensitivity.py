"""What an error in each weight costs: the loss of held-out calibration text with one layer rounded."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cllm.compress.calibration import calibrate
from cllm.compress.decoders import Points, babai
from cllm.compress.problem import problem
from cllm.compress.source import Source
from cllm.model.cross_entropy import cross_entropy_sum
from cllm.model.transformer import Transformer
from cllm.training.progress import Progress

# A step of so many standard deviations: its error is large enough for the loss's second order to show.
PROBE = 1.5
WINDOWS = 24
LEAST_DISTORTION = 1 / 12 * 2 * math.pi * math.e
"""Mean squared error of a scalar quantizer with entropy coding over σ² 2^(−2R), at high rate."""


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """A weight's part in the loss.

    ``cost``: nats a token of a unit of error, measured. ``unit``: predicted error of nearest plane at rate
    0, so that the error at R bits a weight is about ``unit`` · 2^(−2R): (2πe/12) · count · variance ·
    geometric mean of the Gram–Schmidt profile's squares. ``count``: numbers of the weight.
    """

    cost: float
    unit: float
    count: int

    def rise(self, bits: float) -> float:
        """Predicted rise of the loss at ``bits`` a weight, nats a token; at most that at no bits."""
        return self.cost * self.unit * min(2.0 ** (-2 * bits), 1 / LEAST_DISTORTION)


def sensitivities(source: Source, progress: Progress) -> dict[str, Sensitivity]:
    """Of every linear layer and token table, by parameter name.

    Each is rounded by itself, coarsely, and the loss is measured on windows of the calibration text.
    """
    model = source.model()
    ids = torch.as_tensor(source.windows[: WINDOWS + 1])
    base = _loss(model, ids)
    found: dict[str, Sensitivity] = {}
    with progress.stage("measuring what errors cost") as advance:
        for name, table in model.tables.items():
            weight = table.weight.detach().clone()
            step = PROBE * float(weight.std()) or 1.0
            rounded = (weight / step).round() * step
            error = float((rounded - weight).double().square().sum())
            rise = _with(model, table.weight, rounded, ids) - base
            unit = LEAST_DISTORTION * weight.numel() * float(weight.double().var())
            found[f"{name}.weight"] = Sensitivity(
                cost=max(rise, 1e-6) / max(error, 1e-30), unit=unit, count=weight.numel()
            )
        for layer in calibrate(model, source.windows):
            parameter = layer.linear.weight
            weight = parameter.detach()
            prepared = problem(weight.float(), layer.fit, dtype=torch.float32)
            step = PROBE * float(weight.std()) or 1.0
            points = Points(
                torch.full(prepared.shape, step), torch.zeros(prepared.shape), -1e6, 1e6
            )
            rounded = prepared.back(babai(prepared, points)) * step
            error = float(prepared.objective(rounded).sum())
            rise = _with(model, parameter, rounded, ids) - base
            profile = float(prepared.squares.double().log().mean().exp())
            variance = float(weight.double().square().mean())
            found[f"{layer.name}.weight"] = Sensitivity(
                cost=max(rise, 1e-6) / max(error, 1e-30),
                unit=LEAST_DISTORTION * weight.numel() * variance * profile,
                count=weight.numel(),
            )
            advance(1)
    return found


def _with(model: Transformer, weight: Tensor, values: Tensor, ids: Tensor) -> float:
    """The loss with other values of a weight, which is then as it was."""
    kept = weight.detach().clone()
    try:
        _put(model, weight, values)
        return _loss(model, ids)
    finally:
        _put(model, weight, kept)


def _put(model: Transformer, weight: Tensor, values: Tensor) -> None:
    with torch.no_grad():
        weight.copy_(values)
    for table in model.tables.values():
        table.after_step()


def _loss(model: Transformer, ids: Tensor) -> float:
    """Mean loss in nats of predicting every token of the windows (W, T) but their first."""
    with torch.no_grad():
        hidden = model.output.contract(model.hidden(ids[:, :-1]).flatten(0, 1))
        total = cross_entropy_sum(hidden, model.output.core(), ids[:, 1:].flatten(), 0)
    return float(total) / ids[:, 1:].numel()


def spread_bits(
    items: dict[str, Sensitivity], budget: float, *, least: float, most: float
) -> dict[str, float]:
    """Bits a weight of each item so that Σ count · bits = ``budget`` and all have the same slope of rise
    against bits, within ``least`` and ``most`` (Shoham & Gersho 1988; reverse water-filling).

    Raises ``ValueError`` where the budget is below all at ``least``.
    """
    counts = np.array([item.count for item in items.values()], dtype=np.float64)
    weights = np.array([max(item.cost * item.unit / item.count, 1e-300) for item in items.values()])
    if budget < least * counts.sum():
        raise ValueError(f"{budget / 8:,.0f} bytes are below {least * counts.sum() / 8:,.0f}")
    low, high = -60.0, 60.0
    for _ in range(100):
        level = (low + high) / 2
        bits = np.clip(0.5 * np.log2(weights) - level, least, most)
        low, high = (level, high) if counts @ bits > budget else (low, level)
    bits = np.clip(0.5 * np.log2(weights) - high, least, most)
    return dict(zip(items, bits.tolist(), strict=True))

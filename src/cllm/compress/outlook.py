"""What is expected of rounding one layer: the profile's error, and how the decoder fares on some rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from cllm.compress.calibration import Layer
from cllm.compress.coded import CodedMatrix, bits_like
from cllm.compress.coded_fit import fit_coded
from cllm.compress.expected import Expected, expected_coded, expected_on_grid
from cllm.compress.grids import GridSpec
from cllm.compress.lattices import coding
from cllm.compress.lattices.coding import LatticeMatrix
from cllm.compress.lattices.fixed_fit import fit_fixed
from cllm.compress.prepared import Turned, grid_of, prepared, turned
from cllm.compress.problem import Problem, objective
from cllm.compress.scales import fit_grid
from cllm.compress.settings import Settings
from cllm.core.errors import UserError

ROWS = 16
"""Rows of a layer that are decoded to see how the decoder fares; twice as many of coded ones and codebooks.
"""


@dataclass(frozen=True, eq=False)
class Outlook:
    """What is expected of a layer: ``error`` of rows, each beside what it should be, over the outputs' size
    under the metric, ``shrinkage``, the share of the weights that the error takes from them, ``gain`` of
    the decoder (its error over that expected of nearest plane), and ``spread``, the relative standard error
    of the gain. ``original``: the weight (m, n); all else is of the layer ``turned``.
    """

    name: str
    original: Tensor
    turned: Turned
    problem: Problem
    expected: Expected
    gain: float
    spread: float
    error: float
    shrinkage: float

    def draw(self, generator: torch.Generator) -> Tensor:
        """Weights (m, n) with an error of the expected size under the metric without damping.

        Scales that are best for their codes leave an error that is orthogonal to the result, so that it
        has a part along the weights, and the rest is chance.
        """
        weight, metric, rows = self.turned.weight, self.turned.metric, self.problem.rows
        drawn = self.expected.draw(self.problem, generator)
        whole = _inner(weight, weight, metric)
        # What the draw has along the weights is in the shrinkage.
        drawn = drawn - _inner(drawn, weight, metric) / max(whole, 1e-300) * weight
        size = _inner(drawn, drawn, metric)
        wanted = max(self.error - self.shrinkage**2, 0.0) * whole
        errors = self.shrinkage * weight + drawn * (wanted / max(size, 1e-300)) ** 0.5
        return self.turned.back(weight - (errors if rows is None else rows.carried(errors)))

    def share(self, draws: list[Tensor], seen: Tensor) -> float:
        """Squared error of the outputs of ``draws`` over their squared size, as the report has it."""
        whole = float(objective(self.original, torch.zeros_like(self.original), seen).sum())
        made = [float(objective(self.original, draw, seen).sum()) for draw in draws]
        return sum(made) / len(made) / max(whole, 1e-300)


def outlook(layer: Layer, settings: Settings, generator: torch.Generator) -> Outlook:
    """Of ``layer`` in its turn, rounded by ``settings``."""
    whole = turned(layer, settings)
    weight, metric, spec = whole.weight, whole.metric, grid_of(settings)
    by_rate = settings.is_coded or settings.is_fixed
    count = min(len(weight), 2 * ROWS if by_rate else ROWS)
    rows = torch.linspace(0, len(weight) - 1, count).round().long()
    ready = prepared(weight, metric, whole.damping(settings, rows), settings, layer.outer)
    rate = settings.bits
    expected = expected_coded(ready, rate) if by_rate else expected_on_grid(ready, spec)
    wished = weight
    if ready.rows is not None:  # rows make up for errors in those before, as they may turn out
        drawn = expected.draw(ready, generator)
        wished = weight + drawn - ready.rows.carried(drawn)
    picked = wished[rows]
    try:
        values, surplus = _decoded(ready.with_weight(picked), settings, spec)
    except ValueError as error:
        raise UserError(f"{layer.name}: nothing can be told from {count} rows: {error}") from error
    # What the damping adds to the metric is no error of the outputs.
    made = objective(picked, values, metric) * surplus
    wanted = expected.error[rows]
    gain = float(made.sum() / wanted.sum().clamp_min(1e-300))
    ratio = (made - gain * wanted) / wanted.mean().clamp_min(1e-300) / max(gain, 1e-300)
    size = _inner(weight, weight, metric)
    taken = _inner(picked - values, picked, metric)
    shrinkage = taken / max(_inner(picked, picked, metric), 1e-300)
    return Outlook(
        name=f"{layer.name}.weight",
        original=layer.linear.weight.detach().float().clone(),
        turned=whole,
        problem=ready,
        expected=expected,
        gain=gain,
        spread=float(ratio.std()) / len(rows) ** 0.5 if len(rows) > 1 else 1.0,
        error=gain * float(expected.error.sum()) / max(size, 1e-300),
        shrinkage=surplus * shrinkage,
    )


def _inner(first: Tensor, second: Tensor, metric: Tensor) -> float:
    """Σ of first·metric·second over the rows (m, n)."""
    return float((first.double() @ metric.double() * second.double()).sum())


def _decoded(some: Problem, settings: Settings, spec: GridSpec) -> tuple[Tensor, float]:
    """What the rows of ``some`` become, and how much larger their error would be at the bits asked for."""
    if settings.is_fixed:
        matrix = fit_fixed(some, settings.fixed_spec, by_metric=settings.method != "rtn")
        return matrix.dense(), 1.0
    if not settings.is_coded:
        grid, codes = fit_grid(some, spec, settings.decoder, scales=settings.scales)
        return grid.values(codes), 1.0
    target = int(settings.bits * some.weight.numel() / 8)
    coded, data = fit_coded(some, target, settings.decoder, settings.coded_spec)
    if not coded.integers.any():
        return torch.from_numpy(coded.dense()), 1.0
    # Few rows pay more for the models' description than all do: what they lack is 6 dB a bit.
    surplus = 4.0 ** (_lasting_bits(coded, data) - settings.bits)
    return torch.from_numpy(coded.dense()), surplus


def _lasting_bits(matrix: CodedMatrix | LatticeMatrix, data: bytes) -> float:
    """Bits a weight without what describes the models; ``data``: the matrix in bytes."""
    if isinstance(matrix, CodedMatrix):
        classes, table = bits_like(matrix.integers)
        sizes = abs(matrix.integers).clip(max=table.shape[1] - 1)
        return float(table[classes, sizes].mean())
    # What the same rows take a second time.
    twice = replace(matrix, integers=np.concatenate([matrix.integers] * 2))
    return 8 * (len(coding.encode(twice)) - len(data)) / matrix.integers.size

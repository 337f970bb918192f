"""A layer as it is rounded: turned where that was asked for, damped, and its columns in blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cllm.compress.calibration import Layer
from cllm.compress.damping import choose_damping
from cllm.compress.grids import GridSpec
from cllm.compress.lattices.blocks import block_numbers
from cllm.compress.problem import Problem, checked_metric, problem
from cllm.compress.rotation import Rotation, rotation_of
from cllm.compress.settings import Settings


@dataclass(frozen=True, eq=False)
class Turned:
    """``weight`` (m, n) float32 and the metrics (n, n) float64 of a layer, after ``rotation``."""

    weight: Tensor
    fit: Tensor
    held: Tensor
    metric: Tensor
    rotation: Rotation | None

    def back(self, values: Tensor) -> Tensor:
        """Weights (m, n) as the layer has them."""
        return values if self.rotation is None else self.rotation.undo(values)

    def damping(self, settings: Settings, rows: Tensor | None = None) -> float:
        """What held-out inputs choose for the weight, or for some of its rows."""
        weight = self.weight if rows is None else self.weight[rows]
        spec = grid_of(settings)
        return choose_damping(weight, self.fit, self.held, spec, order=settings.order)


def turned(layer: Layer, settings: Settings) -> Turned:
    """``layer`` as ``settings`` turn it."""
    weight = layer.linear.weight.detach().float().clone()
    fit, held, metric = layer.fit, layer.held, checked_metric(layer.whole)
    shape = int(weight.shape[0]), int(weight.shape[1])
    rotation = rotation_of(settings.rotate, layer.name, shape)
    if rotation is not None:
        weight = rotation.apply(weight)
        fit, held, metric = (rotation.metric(one) for one in (fit, held, metric))
    return Turned(weight, fit, held, metric, rotation)


def grid_of(settings: Settings) -> GridSpec:
    """The grid; one like it where points come from no grid, which only chooses the damping."""
    by_rate = settings.is_coded or settings.is_fixed
    return GridSpec(bits=3, group=0) if by_rate else settings.grid_spec


def prepared(
    weight: Tensor, metric: Tensor, damping: float, settings: Settings, outer: Tensor | None = None
) -> Problem:
    """The problem, the columns of a block together."""
    return problem(
        weight,
        metric,
        damping=damping,
        order=settings.order,
        dtype=torch.float32,
        blocks=block_numbers(settings.blocks, weight.shape[1]) if settings.blocks else None,
        outer=outer,
    )

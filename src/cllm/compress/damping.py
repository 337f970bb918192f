"""How much to damp H: by what the decoded layer costs on calibration text that H has not seen."""

from __future__ import annotations

import torch
from torch import Tensor

from cllm.compress.decoders import Decoder
from cllm.compress.grids import GridSpec, range_grid
from cllm.compress.problem import checked_metric, objective, problem

DAMPINGS = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)
"""Shares of the mean diagonal that are tried."""


def choose_damping(
    weight: Tensor, fit: Tensor, held: Tensor, spec: GridSpec, *, order: str = "act"
) -> float:
    """The damping of ``fit`` whose Babai-decoded ``weight`` (m, n) has the least error under ``held``.

    ``fit`` and ``held`` are H (n, n) of two parts of the calibration text.
    """
    metric = checked_metric(held)
    decoder, grid = Decoder(method="babai"), range_grid(weight, spec, 0.8 if spec.bits < 4 else 1.0)
    errors = []
    for damping in DAMPINGS:
        prepared = problem(weight, fit, damping=damping, order=order, dtype=torch.float32)
        values = grid.values(decoder(prepared, grid))
        errors.append(float(objective(weight, values, metric).sum()))
    return DAMPINGS[min(range(len(errors)), key=errors.__getitem__)]

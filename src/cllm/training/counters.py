"""What is counted of training steps, and fp16's loss scale, which follows from it.

Scalar tensors on the CPU, which checkpoints keep as they keep weights: ``applied`` steps, ``skipped`` ones,
``in_row`` skipped ones since the last applied, and for fp16 the ``loss_scale`` and the ``calm`` steps since
it changed.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOSS_SCALE_START = 2.0**14
LOSS_SCALE_PATIENCE = 500
"""Steps without overflow after which fp16's loss scale is doubled."""


def new_counters(scaling: bool) -> dict[str, Tensor]:
    """Those of no step yet; ``scaling``: whether losses are scaled."""
    names = ("applied", "skipped", "in_row", "loss_scale", "calm")
    counters = {name: torch.zeros(()) for name in names}
    counters["loss_scale"].fill_(LOSS_SCALE_START if scaling else 1.0)
    return counters


def count_step(counters: dict[str, Tensor], applied: bool, scaling: bool) -> None:
    """Count a step; halve fp16's loss scale on overflow, double it after many calm steps
    (Micikevicius et al. 2018)."""
    # `fill_` and no arithmetic: torch would make a tensor of each number.
    counters["applied"].fill_(float(counters["applied"]) + applied)
    counters["skipped"].fill_(float(counters["skipped"]) + (not applied))
    counters["in_row"].fill_(0.0 if applied else float(counters["in_row"]) + 1.0)
    if not scaling:
        return
    scale, calm = float(counters["loss_scale"]), float(counters["calm"])
    calm = calm + 1.0 if applied else 0.0
    if not applied:
        scale *= 0.5
    elif calm >= LOSS_SCALE_PATIENCE:
        scale, calm = 2.0 * scale, 0.0
    counters["loss_scale"].fill_(scale)
    counters["calm"].fill_(calm)

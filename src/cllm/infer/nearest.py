"""Nearest rows of a table of vectors."""

from __future__ import annotations

import torch
from torch import Tensor


def nearest_by_cosine(table_vd: Tensor, row: int, k: int = 10) -> tuple[list[int], list[float]]:
    """The ``k`` other rows of (V, D) whose direction is nearest to a row's, and their cosines, the
    largest first; all of them if there are fewer. A row of zeros has cosine 0 with every other.

    Raises:
        ValueError: no such row, ``k`` below 1, or a table with NaN or infinity, whose order means nothing.
    """
    spoiled = (~torch.isfinite(table_vd)).any(dim=1).nonzero()
    if len(spoiled):
        raise ValueError(
            f"the table of shape {tuple(table_vd.shape)} is not finite in row {int(spoiled[0])}; "
            "take an earlier checkpoint"
        )
    if not 0 <= row < len(table_vd) or k < 1:
        raise ValueError(f"no row {row} of {len(table_vd)}, or k = {k} is below 1")
    with torch.no_grad():
        unit_vd = torch.nn.functional.normalize(table_vd.float(), dim=1)
        cosines_v = unit_vd @ unit_vd[row]
        cosines_v[row] = -torch.inf
        top = cosines_v.topk(min(k, len(table_vd) - 1))
    return top.indices.tolist(), top.values.tolist()

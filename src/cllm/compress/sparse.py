"""Pruned matrices as compressed sparse rows."""

from __future__ import annotations

import torch
from torch import Tensor

PARTS = ("values", "columns", "counts")


def store(weight: Tensor) -> dict[str, Tensor]:
    """Compressed sparse rows of ``weight`` (m, n), n ≤ 65,536: fp16 values of what is not zero, its columns
    (16 bits), and how many there are in each row (32 bits)."""
    assert weight.shape[1] <= 1 << 16
    half = weight.to(torch.float16)
    there = half != 0
    columns = there.nonzero()[:, 1]
    return {
        "values": half[there],
        # int16 holds 65,536 columns modulo its sign.
        "columns": torch.where(columns >= 1 << 15, columns - (1 << 16), columns).to(torch.int16),
        "counts": there.sum(dim=1).to(torch.int32),
    }


def read(parts: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
    """The dense float32 (m, n) matrix. Raises ``ValueError`` for parts that do not fit together."""
    counts = parts["counts"].long()
    columns = parts["columns"].long() & 0xFFFF
    sound = len(counts) == shape[0] and int(counts.sum()) == len(columns) == len(parts["values"])
    if not sound or (len(columns) and int(columns.max()) >= shape[1]):
        raise ValueError("rows, columns and values of the sparse matrix do not fit together")
    rows = torch.arange(shape[0]).repeat_interleave(counts)
    out = torch.zeros(shape)
    out[rows, columns] = parts["values"].float()
    return out

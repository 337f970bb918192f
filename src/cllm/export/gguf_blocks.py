"""Weights as ggml stores them: plain floats, or blocks of 32 integers with a scale in half precision.

``pack_q8_0`` and ``pack_q4_0`` take integers that someone else chose (a decoder of ours): rounding is
theirs, the layout is ggml's.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from cllm.core.errors import UserError, require

BLOCK = 32
"""Numbers of a block, along a row of the weight."""


def gguf_package() -> ModuleType:
    """The package ``gguf``; ``UserError`` if it is not installed."""
    return require("gguf", "gguf", "exporting to gguf")


@dataclass(frozen=True, eq=False)
class Stored:
    """A weight as it is stored. Rows stay rows: blocks never cross them, so rows can be picked."""

    kind: str
    """``F32``, ``F16``, ``BF16``, ``Q8_0`` or ``Q4_0``."""
    data: np.ndarray
    """(rows, …): floats for F32 and F16, else uint8 bytes."""

    def rows(self, picked: np.ndarray) -> Stored:
        """Some of the rows, in this order."""
        return Stored(self.kind, np.ascontiguousarray(self.data[picked]))

    def values(self) -> np.ndarray:
        """The float32 numbers that it stands for."""
        gguf = gguf_package()
        made = gguf.quants.dequantize(self.data, _type(gguf, self.kind))
        return np.ascontiguousarray(made, dtype=np.float32)


def store(values: np.ndarray, kind: str, name: str) -> Stored:
    """Round float32 values (rows, columns) or (columns,) to ``kind``, blocks as ggml's reference does.

    Raises ``UserError`` for rows that blocks do not divide and for values beyond half precision.
    """
    gguf = gguf_package()
    if kind.startswith("Q"):
        refuse_width(values.shape[-1], kind, name)
    with np.errstate(over="ignore"):  # an overflow is found below
        made = Stored(kind, gguf.quants.quantize(np.ascontiguousarray(values), _type(gguf, kind)))
    if not np.isfinite(made.values()).all():
        raise UserError(f"{name} leaves the range of {kind}; use bf16 or f32")
    return made


def refuse_width(width: int, kind: str, name: str) -> None:
    """Raise ``UserError`` where a row of ``width`` numbers is not whole blocks."""
    if width % BLOCK:
        raise UserError(
            f"gguf cannot store {name} as {kind}: its rows have {width} numbers, and a block has "
            f"{BLOCK}; use f16"
        )


def pack_q8_0(integers: np.ndarray, scales: np.ndarray) -> Stored:
    """Blocks of Q8_0: value = scale · integer, integers (rows, columns) in −128…127.

    ``scales`` (rows, columns / 32), rounded to half precision as stored. Raises ``ValueError``.
    """
    rows = _checked(integers, scales, -128, 127)
    body = integers.reshape(rows, -1, BLOCK).astype(np.int8).view(np.uint8)
    return _joined("Q8_0", scales, body)


def pack_q4_0(integers: np.ndarray, scales: np.ndarray) -> Stored:
    """Blocks of Q4_0: value = scale · integer, integers (rows, columns) in −8…7.

    ``scales`` (rows, columns / 32), rounded to half precision as stored. Raises ``ValueError``.
    """
    rows = _checked(integers, scales, -8, 7)
    nibbles = (integers.reshape(rows, -1, 2, BLOCK // 2) + 8).astype(np.uint8)
    # A byte holds number i of the block's first half below and of its second half above.
    return _joined("Q4_0", scales, nibbles[:, :, 0] | (nibbles[:, :, 1] << 4))


def _checked(integers: np.ndarray, scales: np.ndarray, low: int, high: int) -> int:
    rows, columns = integers.shape
    if columns % BLOCK or scales.shape != (rows, columns // BLOCK):
        raise ValueError(
            f"scales of shape {scales.shape} do not fit integers of shape {integers.shape} in blocks of "
            f"{BLOCK}"
        )
    if integers.size and not (low <= integers.min() and integers.max() <= high):
        raise ValueError(f"integers must be from {low} to {high}")
    return int(rows)


def _joined(kind: str, scales: np.ndarray, body: np.ndarray) -> Stored:
    with np.errstate(over="ignore"):
        half = scales.astype(np.float16)
    if not np.isfinite(half).all():
        raise ValueError("a scale is not finite in half precision")
    parts = [half[:, :, None].view(np.uint8).reshape(*half.shape, 2), body]
    whole = np.concatenate(parts, axis=2)
    return Stored(kind, whole.reshape(len(whole), -1))


def _type(gguf: ModuleType, kind: str) -> Any:
    return gguf.GGMLQuantizationType[kind]

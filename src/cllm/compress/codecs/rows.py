"""Rows of small integers, each with a half-precision scale: the plain way, and the peer to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cllm.compress.codecs.frame import Reader, as_table, pack

HALF_MAX = 65504.0  # of float16


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Symmetric integers of ``bits`` (2 to 8) for each entry, one float16 scale for each row.

    Each row's scale is the one of least squared error among ``trials`` shares of its largest entry
    (clipping what is beyond), as OMSE does (Choukroun et al. 2019). ``metric`` and ``frequency`` are
    accepted and not used.
    """

    bits: int = 8
    trials: int = 32

    name = "rows"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"rows of integers have 2 to 8 bits, not {self.bits}")
        if self.trials < 1:
            raise ValueError(f"at least one trial of a scale is needed, not {self.trials}")

    def encode(self, array: Any, metric: Any = None, *, frequency: Any = None) -> bytes:
        """``array`` (V, D) as bytes: ⌈V·D·bits/8⌉ and 2 for each row. ``ValueError`` for what is no table,
        or has rows beyond float16's scales."""
        table = as_table(array)
        scales, integers = self._quantize(table)
        low = -(1 << (self.bits - 1))
        planes = (integers - low).astype(np.uint8)[..., None] >> np.arange(
            self.bits, dtype=np.uint8
        )
        packed = np.packbits((planes & 1).ravel(), bitorder="little").tobytes()
        body = bytes([self.bits]) + scales.astype("<f2").tobytes() + packed
        return pack(self.name, table.shape, body)

    def _quantize(self, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        high = (1 << (self.bits - 1)) - 1
        largest = np.abs(table).max(axis=1)
        if largest.max() / high > HALF_MAX:
            raise ValueError(
                f"the table of shape {table.shape} has an entry of {largest.max():.3g}, beyond scales"
                " in float16; divide it first"
            )
        least = np.full(len(table), np.inf)
        scales = np.zeros(len(table), dtype=np.float16)
        integers = np.zeros(table.shape, dtype=np.int16)
        for share in np.linspace(0.3, 1.0, self.trials) if self.trials > 1 else (1.0,):
            scale = (largest * (share / high)).astype(np.float16)
            q, error = _round(table, scale, high)
            better = error < least
            least[better], scales[better], integers[better] = (
                error[better],
                scale[better],
                q[better],
            )
        return scales, integers


def _round(table: np.ndarray, scale: np.ndarray, high: int) -> tuple[np.ndarray, np.ndarray]:
    wide = scale.astype(np.float64)[:, None]
    divisor = np.where(wide > 0, wide, 1.0)
    q = np.clip(np.rint(table / divisor), -high - 1, high) * (wide > 0)
    return q.astype(np.int16), ((table - q * wide) ** 2).sum(axis=1)


def decode(body: bytes, shape: tuple[int, int]) -> np.ndarray:
    """The (V, D) float32 table of ``Rows.encode``. ``ValueError`` for bytes that are no such thing."""
    _, scales, integers = parts(body, shape)
    return integers.astype(np.float32) * scales.astype(np.float32)[:, None]


def parts(body: bytes, shape: tuple[int, int]) -> tuple[int, np.ndarray, np.ndarray]:
    """Bits, scales (V,) float16 and integers (V, D) int8 of such a table. ``ValueError`` as ``decode``."""
    rows, columns = shape
    reader = Reader(body)
    bits = reader.number("<B")
    if not 2 <= bits <= 8:
        raise ValueError(f"damaged table: {bits} bits an entry")
    scales = reader.array("<f2", rows)
    packed = np.frombuffer(reader.take(-(-rows * columns * bits // 8)), dtype=np.uint8)
    reader.end()
    planes = np.unpackbits(packed, count=rows * columns * bits, bitorder="little")
    integers = planes.reshape(rows, columns, bits) @ (1 << np.arange(bits)) - (1 << (bits - 1))
    return int(bits), scales, integers.astype(np.int8)

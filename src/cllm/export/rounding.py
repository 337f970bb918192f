"""Weights as integers in blocks of 32 along a row, each block with a scale: value = scale · integer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BLOCK = 32
"""Numbers that share a scale."""


@dataclass(frozen=True, eq=False)
class Rounded:
    """A weight (rows, columns) in integers of ``bits`` (4 or 8)."""

    bits: int
    integers: np.ndarray
    """(rows, columns) int8."""
    scales: np.ndarray
    """(rows, columns / 32) float32."""

    def values(self) -> np.ndarray:
        """The float32 numbers (rows, columns) that it stands for."""
        rows, columns = self.integers.shape
        blocks = self.integers.reshape(rows, -1, BLOCK).astype(np.float32)
        return (blocks * self.scales[:, :, None]).reshape(rows, columns)


def round_blocks(values: np.ndarray, bits: int) -> Rounded:
    """The nearest integers under a scale that makes the largest number of its block an integer.

    With 8 bits that is ±127; with 4 it is −8, so that the one integer more that two's complement has on
    that side is used. Raises ``ValueError`` for rows that are not whole blocks.
    """
    rows, columns = values.shape
    if columns % BLOCK:
        raise ValueError(f"rows of {columns} numbers are not whole blocks of {BLOCK}")
    blocks = values.reshape(rows, -1, BLOCK).astype(np.float32)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[:, :, None], axis=-1)
    scales = np.abs(largest) / 127 if bits == 8 else largest / -8
    with np.errstate(divide="ignore", invalid="ignore"):
        divided = np.where(scales == 0, 0, blocks / scales)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    integers = np.rint(divided).clip(low, high).astype(np.int8)
    return Rounded(bits, integers.reshape(rows, columns), scales[:, :, 0])

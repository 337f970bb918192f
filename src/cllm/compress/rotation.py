"""Random Hadamard rotation of a weight matrix: outliers are spread over many entries before rounding."""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROTATIONS = ("none", "hadamard")


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """W becomes P W Q, and its metric H becomes Qᵀ H Q: distances under H stay what they are.

    Q and P are random signs times Walsh–Hadamard matrices over blocks of columns and rows: the incoherence
    processing of QuIP# (Tseng et al., 2024). A block's size is the largest power of 2 that divides the
    shape's. Signs are bits of SHAKE-256, alike on every machine.
    """

    seed: int
    rows: int
    columns: int

    def apply(self, weight: Tensor) -> Tensor:
        """P W Q of ``weight`` (rows, columns)."""
        inner = hadamard(weight * self._signs("columns", weight))
        return hadamard(inner.T * self._signs("rows", weight)).T.contiguous()

    def metric(self, H: Tensor) -> Tensor:
        """Qᵀ H Q of ``H`` (columns, columns)."""
        signs = self._signs("columns", H)
        half = hadamard(H * signs)
        turned = hadamard(half.T * signs)
        return (turned + turned.T) / 2

    def undo(self, weight: Tensor) -> Tensor:
        """The W of P W Q. Additions in one order, so that all machines read the same weights."""
        inner = hadamard(weight.T.contiguous()) * self._signs("rows", weight)
        return (hadamard(inner.T.contiguous()) * self._signs("columns", weight)).contiguous()

    def _signs(self, side: str, like: Tensor) -> Tensor:
        count = self.rows if side == "rows" else self.columns
        data = hashlib.shake_256(f"{side} {self.seed}".encode("ascii")).digest(-(-count // 8))
        bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8))[:count]
        return torch.from_numpy(1.0 - 2.0 * bits).to(like.dtype)

    def facts(self) -> dict[str, Any]:
        """What a file says of it."""
        return {"hadamard": self.seed}


def rotation_of(kind: str, name: str, shape: tuple[int, int]) -> Rotation | None:
    """The rotation of the weight ``name`` of ``shape`` (m, n), with a seed of its own.

    Raises ``ValueError`` for an unknown kind.
    """
    if kind not in ROTATIONS:
        raise ValueError(f"the rotation is {' or '.join(ROTATIONS)}, not {kind!r}")
    if kind == "none":
        return None
    return Rotation(seed=zlib.crc32(name.encode("utf-8")), rows=shape[0], columns=shape[1])


def stored_rotation(facts: dict[str, Any], shape: tuple[int, ...]) -> Rotation | None:
    """The rotation that a file's facts name, if they do."""
    if "hadamard" not in facts:
        return None
    return Rotation(seed=int(facts["hadamard"]), rows=shape[0], columns=shape[1])


def hadamard(x: Tensor) -> Tensor:
    """Rows of ``x`` (k, n) times an orthonormal Walsh–Hadamard matrix, in blocks of the largest power of 2
    that divides n."""
    k, n = x.shape
    block = n & -n
    out, half = x, 1
    while half < block:
        pairs = out.reshape(k, -1, 2, half)
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        out = torch.stack([a + b, a - b], dim=2).reshape(k, n)
        half *= 2
    return out * block**-0.5

"""Compressed weights whose numbers can be trained: what the file holds of them stays what it may hold.

Every value that a forward pass sees is one that the file can store; gradients pass straight through the
rounding to it (Bengio, Léonard & Courville 2013).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from cllm.compress import coded
from cllm.compress.formats import grid_of, store_grid, store_plain
from cllm.compress.grids import Grid, as_stored
from cllm.compress.layer import Piece, as_bytes

_TRIES = 6
# Integers begin so far on the way to the weight that was rounded, and inside their cell.
_LEAN, _EDGE = 0.5, 0.45
RATES = {"scale": 0.015, "norm": 0.01, "code": 0.02}
"""Step of Adam at its largest: scales and offsets in shares of the scale, codes in codes."""


class Learned(Protocol):
    """A weight that is trained."""

    def parameters(self) -> dict[str, list[Tensor]]:
        """Leaves by what they are (a key of ``RATES``)."""

    def values(self) -> Tensor:
        """The weight as the file would hold it, differentiable in the parameters."""

    def piece(self) -> Piece:
        """What the file holds of it now."""


def learned(piece: Piece, weight: Tensor, *, rounding: bool) -> Learned | None:
    """``piece`` of ``weight`` to be trained, ``None`` if nothing of it can be: its kind has no scale of its
    own.

    ``rounding``: codes on a grid are trained, too.
    """
    stored = piece.stored
    if stored.kind == "grid" or stored.kind.startswith("gguf-"):
        return OnGrid(piece, weight, rounding=rounding)
    if stored.kind == "coded":
        return Coded(piece, rounding=rounding)
    if stored.kind == "plain" and len(stored.shape) == 1 and "buffer" not in stored.facts:
        return Vector(piece)
    return None


def straight_through(real: Tensor, rounded: Tensor) -> Tensor:
    """``rounded``, with the gradient of ``real``."""
    return real + (rounded - real).detach()


class OnGrid:
    """Codes on a grid: scales and offsets as shares of the scale at the start, codes as real numbers that
    are rounded and clipped to the box.

    A real number begins halfway from its code to the weight, within the code's cell: codes that were a
    near thing need little to move.
    """

    def __init__(self, piece: Piece, weight: Tensor, *, rounding: bool) -> None:
        self.start = piece
        self.grid, self.codes = grid_of(piece.stored, piece.parts)
        self.shift = torch.zeros_like(self.grid.scale, dtype=torch.float32).requires_grad_()
        self.move: Tensor | None = None
        if self.grid.offset is not None:
            self.move = torch.zeros_like(self.shift).requires_grad_()
        self.group = self.grid.spec.group_of(self.grid.columns)
        self.real = self.codes.float()
        if rounding:
            lean = _LEAN * (self._exact(weight) - self.real).nan_to_num()
            real = self.real + lean.clamp(-_EDGE, _EDGE)
            # Beyond the box no gradient would reach it.
            self.real = real.clamp(self.grid.spec.low, self.grid.spec.high).requires_grad_()

    def parameters(self) -> dict[str, list[Tensor]]:
        """See ``Learned``."""
        found = {"scale": [self.shift] if self.move is None else [self.shift, self.move]}
        return found | ({"code": [self.real]} if self.real.requires_grad else {})

    def _exact(self, weight: Tensor) -> Tensor:
        """Codes (m, n) that would be ``weight``, not finite where a scale is 0."""
        offset = 0.0 if self.grid.offset is None else self.grid.offset.float()[:, self.group]
        return (weight.float() - offset) / self.grid.scale.float()[:, self.group]

    def _scale(self) -> Tensor:
        real = self.grid.scale.float() * (1 + self.shift)
        return straight_through(real, as_stored(real.detach()).float())

    def _offset(self) -> Tensor | None:
        if self.grid.offset is None or self.move is None:
            return None
        real = self.grid.offset.float() + self.grid.scale.float() * self.move
        return straight_through(real, as_stored(real.detach()).float())

    def _code(self) -> Tensor:
        spec = self.grid.spec
        inside = self.real.clamp(spec.low, spec.high)
        return straight_through(inside, inside.detach().round())

    def values(self) -> Tensor:
        """See ``Learned``."""
        offset, scaled = self._offset(), self._scale()[:, self.group] * self._code()
        return scaled if offset is None else offset[:, self.group] + scaled

    def piece(self) -> Piece:
        """See ``Learned``."""
        with torch.no_grad():
            offset, codes = self._offset(), self._code().long()
            grid = Grid(
                self.grid.spec,
                self.grid.columns,
                self._scale().double(),
                None if offset is None else offset.double(),
            )
        stored, parts = store_grid(grid, codes)
        moved = float((codes != self.codes).double().mean())
        return Piece(stored, parts, grid.values(codes), self.start.figures | {"moved": moved})


class Coded:
    """Entropy-coded integers: their one step, and the integers as real numbers that are rounded.

    What moved must fit into the bytes that the weight was promised (``figures["room"]``, else what it
    takes): of the moves away from 0, those that went least beyond the border are taken back until it does.
    """

    def __init__(self, piece: Piece, *, rounding: bool) -> None:
        self.start = piece
        self.room = int(piece.figures.get("room", piece.bytes))
        self.matrix = coded.decode_matrix(piece.parts[""].numpy().tobytes())
        self.steps = torch.from_numpy(self.matrix.steps()).float()
        self.shift = torch.zeros(()).requires_grad_()
        self.codes = torch.from_numpy(self.matrix.integers).float()
        self.real = self.codes.clone()
        if rounding:
            self.real.requires_grad_()

    def parameters(self) -> dict[str, list[Tensor]]:
        """See ``Learned``."""
        return {"scale": [self.shift]} | ({"code": [self.real]} if self.real.requires_grad else {})

    def values(self) -> Tensor:
        """See ``Learned``."""
        codes = straight_through(self.real, self.real.detach().round())
        return codes * (self.steps * (1 + self.shift))

    def piece(self) -> Piece:
        """See ``Learned``."""
        step = float(
            torch.tensor(self.matrix.step * (1 + float(self.shift.detach())), dtype=torch.float32)
        )
        low, high = 0.0, 1.0
        codes, data = self._fitted(step, low)
        if len(data) > self.room:
            for _ in range(_TRIES):
                middle = (low + high) / 2
                codes, data = self._fitted(step, middle)
                low, high = (middle, high) if len(data) > self.room else (low, middle)
            codes, data = self._fitted(step, high)
            if len(data) > self.room:  # not even without the moves away from 0
                codes, data = self.codes, coded.encode(replace(self.matrix, step=step))
        matrix = replace(self.matrix, step=step, integers=codes.to(torch.int64).numpy())
        values = torch.from_numpy(matrix.dense())
        figures = self.start.figures | {"moved": float((codes != self.codes).double().mean())}
        return Piece(self.start.stored, {"": as_bytes(data)}, values, figures)

    def _fitted(self, step: float, margin: float) -> tuple[Tensor, bytes]:
        """The integers without moves away from 0 that went less than ``margin`` beyond the border."""
        with torch.no_grad():
            codes = self.real.round()
            longer = codes.abs() > self.codes.abs()
            near = (self.real - self.codes).abs() < 0.5 + margin
            codes = torch.where(longer & near, self.codes, codes)
        integers = codes.to(torch.int64).numpy()
        return codes, coded.encode(replace(self.matrix, step=step, integers=integers))


class Vector:
    """A norm's gain or bias."""

    def __init__(self, piece: Piece) -> None:
        self.start = piece
        self.dtype = str(piece.stored.facts["dtype"])
        self.real = piece.values.clone().requires_grad_()

    def parameters(self) -> dict[str, list[Tensor]]:
        """See ``Learned``."""
        return {"norm": [self.real]}

    def values(self) -> Tensor:
        """See ``Learned``."""
        _, parts = store_plain(self.real, self.dtype)
        return straight_through(self.real, parts[""].float())

    def piece(self) -> Piece:
        """See ``Learned``."""
        stored, parts = store_plain(self.real, self.dtype)
        return Piece(stored, parts, parts[""].float(), self.start.figures)

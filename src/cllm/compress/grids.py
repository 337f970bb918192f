"""Grids that a format can hold: integers of a few bits, times a scale, plus an offset, in groups."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GROUPS = (32, 64, 128, 0)
"""Columns that share a scale; 0 is the whole row."""


@dataclass(frozen=True, kw_only=True)
class GridSpec:
    """A kind of grid.

    Attributes:
        bits: 2, 3, 4 or 8 bits of a code.
        symmetric: codes −2^(bits−1) … 2^(bits−1) − 1 times a scale; else the same plus an offset.
        group: columns that share a scale, 0 for the whole row; the last group of a row may be shorter.
        block: "" for ours, or llama.cpp's ``gguf-q4_0`` (4 bits, −8 … 7) and ``gguf-q8_0`` (8 bits,
            −127 … 127): blocks of 32 columns with an fp16 scale.
    """

    bits: int
    symmetric: bool = True
    group: int = 128
    block: str = ""

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 8):
            raise ValueError(f"a grid has 2, 3, 4 or 8 bits, not {self.bits}")
        if self.group < 0:
            raise ValueError(f"a group has columns, not {self.group}")
        if self.block and (self.block, self.bits, self.symmetric, self.group) not in BLOCKS:
            raise ValueError(
                f"no grid {self.block!r} of {self.bits} bits in groups of {self.group}"
            )

    @property
    def low(self) -> int:
        """The least code."""
        return -127 if self.block == "gguf-q8_0" else -(2 ** (self.bits - 1))

    @property
    def high(self) -> int:
        """The largest code."""
        return 2 ** (self.bits - 1) - 1

    def group_of(self, columns: int) -> Tensor:
        """(columns,) int64: the group of each column."""
        return torch.arange(columns) // (self.group or max(columns, 1))

    def groups(self, columns: int) -> int:
        """How many groups a row of ``columns`` has."""
        return -(-columns // (self.group or max(columns, 1)))

    def check_shape(self, shape: tuple[int, int]) -> None:
        """Raise ``ValueError`` where the grid's blocks do not fit ``shape`` (m, n)."""
        if self.block and shape[1] % self.group:
            raise ValueError(
                f"{self.block} takes {self.group} columns at a time, and a matrix has shape {shape}"
            )


BLOCKS = {("gguf-q4_0", 4, True, 32), ("gguf-q8_0", 8, True, 32)}


def grid_spec(
    bits: int, *, grid: str = "int", symmetric: bool | None = None, group: int | str = 128
) -> GridSpec:
    """The grid by its names on the command line: ``int``, ``gguf-q4_0`` or ``gguf-q8_0``.

    ``symmetric`` ``None`` means symmetric from 4 bits on: below, half a step of skew is dear. Raises
    ``ValueError`` for what does not exist.
    """
    columns = 0 if group == "row" else int(group)
    if grid == "int":
        return GridSpec(
            bits=bits, symmetric=bits >= 4 if symmetric is None else symmetric, group=columns
        )
    known = {name: width for name, width, _, _ in BLOCKS}
    if grid not in known:
        raise ValueError(f"the grid must be int, {' or '.join(sorted(known))}, not {grid!r}")
    if bits != known[grid]:
        raise ValueError(f"{grid} has {known[grid]} bits, not {bits}")
    return GridSpec(bits=bits, symmetric=True, group=32, block=grid)


@dataclass(frozen=True, eq=False)
class Grid:
    """A grid for one matrix: value = ``scale``[r, g] · code + ``offset``[r, g].

    ``scale`` and ``offset`` (m, groups) hold what the file holds (fp16 values); ``offset`` is ``None``
    where the grid is symmetric. A scale of 0 makes every code 0's value.
    """

    spec: GridSpec
    columns: int
    scale: Tensor
    offset: Tensor | None

    def steps(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """(m, n): the scale of each entry."""
        return self.scale.to(dtype)[:, self.spec.group_of(self.columns)]

    def offsets(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """(m, n): the offset of each entry."""
        if self.offset is None:
            return torch.zeros(len(self.scale), self.columns, dtype=dtype)
        return self.offset.to(dtype)[:, self.spec.group_of(self.columns)]

    def values(self, codes: Tensor) -> Tensor:
        """(m, n) float32 values of integer ``codes``, computed as every reader of the file does."""
        return self.offsets(torch.float32) + self.steps(torch.float32) * codes.to(torch.float32)

    def rows(self, picked: Tensor | slice) -> Grid:
        """The grid of some rows."""
        offset = None if self.offset is None else self.offset[picked]
        return Grid(self.spec, self.columns, self.scale[picked], offset)


def as_stored(values: Tensor) -> Tensor:
    """``values`` rounded to fp16, as float64, within its range; subnormal ones become 0 or the least
    normal number, so that no machine's flushing of subnormals changes a weight."""
    tiny = float(torch.finfo(torch.float16).tiny)
    near = values.double().clamp(-65504.0, 65504.0)
    size = near.abs()
    near = torch.where(
        size < tiny, torch.where(size < tiny / 2, 0.0, torch.sign(near) * tiny), near
    )
    return near.to(torch.float16).double()


def range_grid(weight: Tensor, spec: GridSpec, shrink: float | Tensor = 1.0) -> Grid:
    """The grid whose codes reach over each group's range times ``shrink`` (a number, or (m, 1)).

    For blocks as llama.cpp does it: ``gguf-q4_0`` puts −8 on the entry of largest magnitude, whatever its
    sign; ``gguf-q8_0`` 127.
    """
    spec.check_shape((int(weight.shape[0]), int(weight.shape[1])))
    least, most = _extremes(weight.double(), spec)
    if not spec.symmetric:
        low, high = least * shrink, most * shrink
        scale = as_stored((high - low) / (spec.high - spec.low))
        # A constant group is all offset.
        return Grid(spec, weight.shape[1], scale, as_stored(low - spec.low * scale))
    if spec.block == "gguf-q8_0":
        scale = torch.maximum(least.abs(), most.abs()) / 127
    else:
        # The box has one code more below zero: it goes to the side that reaches farther.
        farthest = torch.where(most.abs() > least.abs(), most, least)
        scale = farthest / spec.low
    return Grid(spec, weight.shape[1], as_stored(scale * shrink), None)


def _extremes(weight: Tensor, spec: GridSpec) -> tuple[Tensor, Tensor]:
    """Least and largest entry (m, groups) of each group."""
    group = spec.group_of(weight.shape[1]).expand(weight.shape[0], -1)
    shape = (weight.shape[0], spec.groups(weight.shape[1]))
    least = torch.full(shape, torch.inf, dtype=weight.dtype).scatter_reduce(
        1, group, weight, "amin"
    )
    most = torch.full(shape, -torch.inf, dtype=weight.dtype).scatter_reduce(
        1, group, weight, "amax"
    )
    return least, most

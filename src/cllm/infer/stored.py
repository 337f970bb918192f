"""A compressed file's own integers behind the packed kernels: nothing is rounded a second time.

Which kernels there are and what they hold (torch 2.13): int8 with a scale for each row
(``_weight_int8pack_mm``, or a product with the integers converted where that is faster) and int4 with a
scale and an offset for each 32, 64, 128 or 256 columns (``_weight_int4pack_mm_for_cpu``). What a file holds
otherwise is brought to these where that is exact: fewer bits stand in more, a scale is repeated, a
product with several groups of columns is a sum of products.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cllm.core.errors import UsageError
from cllm.infer.weights import INT4_ROWS, Int4, Int8, Int8Dynamic, pack
from cllm.store.packing import GridMatrix

Integers = Mapping[str, GridMatrix]
"""The matrices of a file that are integers with scales, by parameter name."""

KINDS = ("int8", "int8-dynamic", "int4")
"""Kinds of weights that take integers as they are."""
INT4_GROUPS = (256, 128, 64, 32)
"""Columns with one scale that torch's int4 kernel knows."""


class Int8Groups(nn.Module):
    """8-bit integers with a scale for each row and each ``group`` columns: a sum of products."""

    def __init__(self, integers_rd: Tensor, scale_rg: Tensor, group: int) -> None:
        super().__init__()
        self.group = group
        columns = zip(integers_rd.split(group, 1), scale_rg.unbind(1), strict=True)
        self.parts = nn.ModuleList(Int8(part.contiguous(), scale) for part, scale in columns)

    def forward(self, x_nd: Tensor) -> Tensor:
        """(N, D) -> (N, R)."""
        parts = zip(self.parts, x_nd.split(self.group, 1), strict=True)
        made: Tensor = sum(part(x.contiguous()) for part, x in parts)
        return made


def matrix_of(weight_rd: Tensor, kind: str, held: GridMatrix | None) -> nn.Module:
    """A matrix as weights of ``kind``: by the integers ``held``, or rounded where there are none.

    Raises ``UsageError`` where ``kind`` cannot hold them as they are, and as ``pack`` does.
    """
    if held is None or kind not in KINDS:
        return pack(weight_rd, kind)
    reason = misfit(held, kind)
    if reason:
        others = [other for other in KINDS if not misfit(held, other)]
        raise UsageError(
            f"--weights {kind} cannot hold the file's integers as they are: {reason}; use "
            f"{' or '.join([*others, 'fp32'])}"
        )
    scale = held.scale.to(weight_rd.dtype)
    if kind == "int4":
        return _int4(held)
    if kind == "int8-dynamic":
        return Int8Dynamic(held.codes, scale[:, 0])
    if scale.shape[1] == 1:
        return Int8(held.codes, scale[:, 0])
    return Int8Groups(held.codes, scale, held.group)


def head_of(table_vd: Tensor, kind: str, held: GridMatrix | None) -> nn.Module:
    """The output table of a file whose layers are taken as they are: by its integers where ``kind`` can
    hold them, else in the model's precision.

    A table that is computed from what the file holds (factors, pieces, snapped coordinates) is none of
    its integers.
    """
    if held is None or misfit(held, kind) or held.codes.shape != table_vd.shape:
        return pack(table_vd, "fp32")
    same = torch.equal(held.dense(table_vd.dtype), table_vd)
    return matrix_of(table_vd, kind, held) if same else pack(table_vd, "fp32")


def misfit(held: GridMatrix, kind: str) -> str:
    """Why ``kind`` (of ``KINDS``) cannot hold these integers exactly; empty if it can."""
    rows, width = held.codes.shape
    scales = f"each {held.group} of {width} columns have a scale"
    if kind == "int4":
        if held.bits > 4:
            return f"they have {held.bits} bits"
        if rows % INT4_ROWS:
            return f"a matrix has {rows} rows, no multiple of {INT4_ROWS}"
        if not _int4_group(held):
            return f"{scales}, and int4 has one for 32, 64, 128 or 256"
        return ""
    if held.offset is not None:
        return "they have an offset beside the scale"
    if held.group < width and kind == "int8-dynamic":
        return f"{scales}, and int8-dynamic has one for a row"
    if width % 4 or (held.group < width and held.group % 4):
        return f"{scales}, and int8 takes 4 columns together"
    return ""


def summary(integers: Integers) -> str:
    """What the layers' matrices are, in a few words: bits and columns with one scale."""
    layers = [matrix for name, matrix in integers.items() if name.startswith("layers.")]
    return ", ".join(sorted({_words(matrix) for matrix in layers}))


def _words(matrix: GridMatrix) -> str:
    whole = matrix.group >= matrix.codes.shape[1]
    offsets = "" if matrix.offset is None else " with offsets"
    return f"{matrix.bits} bits in {'rows' if whole else f'groups of {matrix.group}'}{offsets}"


def _int4_group(held: GridMatrix) -> int:
    """The most columns with one scale that the kernel knows and the file's groups consist of; or 0."""
    width = held.codes.shape[1]
    for group in INT4_GROUPS:
        if width % group == 0 and (held.group % group == 0 or held.group >= width):
            return group
    return 0


def _int4(held: GridMatrix) -> Int4:
    group = _int4_group(held)
    theirs = torch.arange(0, held.codes.shape[1], group) // held.group
    scale = held.scale.float()[:, theirs]
    offset = torch.zeros_like(scale) if held.offset is None else held.offset.float()[:, theirs]
    return Int4(held.codes, scale, offset, group)

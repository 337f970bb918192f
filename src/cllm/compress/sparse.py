"""Sparse matrices in the container: compressed rows (CSR) with relative column indices.

Of each row the kept entries are stored in order, each with how many columns were skipped before it, four
bits (relative indices, Han, Mao & Dally, "Deep Compression", 2016). Where more than 15 are skipped, an
entry of 0 stands between.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cllm.compress.grids import Grid, GridSpec
from cllm.store.container import Stored
from cllm.store.packing import pack_codes, unpack_codes

GAP_BITS = 4
_MOST = (1 << GAP_BITS) - 1

Parts = dict[str, Tensor]


def store_sparse(
    kept: Tensor, values: Tensor, dtype: torch.dtype, name: str
) -> tuple[Stored, Parts]:
    """``values`` (m, n) where ``kept``, in ``dtype``, whose ``name`` (fp16…) goes into the file."""
    padded, gaps, rows = _layout(kept)
    parts = _index(gaps, rows) | {"values": torch.where(kept, values, 0.0)[padded].to(dtype)}
    return Stored(kind="sparse", shape=_shape(kept), facts={"dtype": name}), parts


def store_sparse_grid(kept: Tensor, grid: Grid, codes: Tensor) -> tuple[Stored, Parts]:
    """Codes (m, n) of ``grid`` where ``kept``. An entry that only fills a gap has a mark of its own."""
    padded, gaps, rows = _layout(kept)
    spec = grid.spec
    shifted = codes[padded] + (1 << (spec.bits - 1))
    parts = _index(gaps, rows) | {
        "codes": pack_codes(shifted, spec.bits),
        "filled": (~kept[padded]).nonzero().view(-1).to(torch.int32),
        "scales": grid.scale.to(torch.float16),
    }
    if grid.offset is not None:
        parts["offsets"] = grid.offset.to(torch.float16)
    facts = {"bits": spec.bits, "symmetric": spec.symmetric, "group": spec.group}
    return Stored(kind="sparse", shape=_shape(kept), facts=facts), parts


def part_names(stored: Stored) -> list[str]:
    """Names of the parts of a weight of kind ``sparse``."""
    if "bits" not in stored.facts:
        return ["rows", "gaps", "values"]
    offsets = [] if stored.facts["symmetric"] else ["offsets"]
    return ["rows", "gaps", "codes", "filled", "scales", *offsets]


def read_sparse(stored: Stored, parts: Parts) -> Tensor:
    """The dense (m, n) float32 matrix. Raises ``ValueError`` where the parts contradict each other."""
    m, n = stored.shape
    rows = parts["rows"].long()
    if len(rows) != m + 1 or int(rows[0]) or bool((rows.diff() < 0).any()):
        raise ValueError("the rows of a sparse matrix are out of order")
    gaps = unpack_codes(parts["gaps"], GAP_BITS, int(rows[-1])).long()
    row = torch.repeat_interleave(torch.arange(m), rows.diff())
    ends = torch.cat([torch.zeros(1, dtype=torch.long), (gaps + 1).cumsum(0)])
    column = ends[1:] - ends[rows[row]] - 1
    if len(column) and int(column.max()) >= n:
        raise ValueError("an entry of a sparse matrix lies beyond its columns")
    out = torch.zeros(m, n)
    if "bits" not in stored.facts:
        out[row, column] = parts["values"].float()
        return out
    spec = GridSpec(**stored.facts)
    codes = torch.zeros(m, n)
    half = 1 << (spec.bits - 1)
    codes[row, column] = unpack_codes(parts["codes"], spec.bits, len(column)).float() - half
    offset = None if spec.symmetric else parts["offsets"].double()
    dense = Grid(spec, n, parts["scales"].double(), offset).values(codes)
    real = torch.ones(len(column), dtype=torch.bool)
    real[parts["filled"].long()] = False
    row, column = row[real], column[real]
    out[row, column] = dense[row, column]
    return out


def _shape(kept: Tensor) -> tuple[int, int]:
    return int(kept.shape[0]), int(kept.shape[1])


def _index(gaps: Tensor, rows: Tensor) -> Parts:
    return {"rows": rows.to(torch.int32), "gaps": pack_codes(gaps, GAP_BITS)}


def _layout(kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``kept`` (m, n) with entries that fill long gaps, the gap before each entry, and where each row's
    entries begin (m + 1,)."""
    m, n = kept.shape
    padded = kept.clone()
    since = torch.zeros(m, dtype=torch.long)  # columns skipped since the last entry
    for j in range(n):
        padded[:, j] |= since == _MOST
        since = torch.where(padded[:, j], 0, since + 1)
    # Nothing follows the last kept entry of a row: what would fill there goes.
    after = kept.flip(1).cumsum(1).flip(1) == 0
    padded &= ~after
    row, column = padded.nonzero(as_tuple=True)
    first = torch.ones_like(row, dtype=torch.bool)
    first[1:] = row[1:] != row[:-1]
    before = torch.where(first, -1, column.roll(1))
    rows = torch.cat([torch.zeros(1, dtype=torch.long), padded.sum(1).cumsum(0)])
    return padded, column - before - 1, rows

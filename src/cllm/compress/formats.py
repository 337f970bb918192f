"""A matrix on a grid to what the container holds, and every stored weight back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from cllm.compress import codecs, coded
from cllm.compress.codecs import rows
from cllm.compress.codecs.frame import unpack
from cllm.compress.grids import Grid, GridSpec
from cllm.compress.lattices import coding
from cllm.compress.lattices.fixed import FixedMatrix, FixedSpec, from_parts
from cllm.compress.rotation import stored_rotation
from cllm.compress.sparse import part_names, read_sparse
from cllm.core.errors import UserError
from cllm.store.container import Container, Stored
from cllm.store.packing import (
    GridMatrix,
    pack_codes,
    q4_0_blocks,
    q8_0_blocks,
    read_blocks,
    unpack_codes,
)

Parts = dict[str, Tensor]
"""Tensors of one weight by the name of the part; "" is the weight itself."""

GRIDS = ("grid", "gguf-q4_0", "gguf-q8_0")
"""Kinds of storage that are integers with scales."""
CASTS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def store_plain(values: Tensor, dtype: str) -> tuple[Stored, Parts]:
    """``values`` of any shape as a tensor of ``dtype`` (a key of ``CASTS``).

    Raises ``UserError`` where fp16 would make them infinite.
    """
    cast = values.detach().to(CASTS[dtype])
    if bool(torch.isinf(cast).any()) and not bool(torch.isinf(values).any()):
        raise UserError(
            f"weights beyond {torch.finfo(CASTS[dtype]).max:g} do not fit {dtype}: take bf16"
        )
    return Stored(kind="plain", shape=tuple(values.shape), facts={"dtype": dtype}), {"": cast}


def store_grid(grid: Grid, codes: Tensor) -> tuple[Stored, Parts]:
    """Codes (m, n) on ``grid``."""
    spec, shape = grid.spec, (int(codes.shape[0]), int(codes.shape[1]))
    if spec.block:
        make = q4_0_blocks if spec.block == "gguf-q4_0" else q8_0_blocks
        return Stored(kind=spec.block, shape=shape), {"": make(codes, grid.scale)}
    parts = {
        "codes": pack_codes(codes + (1 << (spec.bits - 1)), spec.bits),
        "scales": grid.scale.to(torch.float16),
    }
    if grid.offset is not None:
        parts["offsets"] = grid.offset.to(torch.float16)
    facts = {"bits": spec.bits, "symmetric": spec.symmetric, "group": spec.group}
    return Stored(kind="grid", shape=shape, facts=facts), parts


def grid_of(stored: Stored, parts: Parts) -> tuple[Grid, Tensor]:
    """The grid and the codes (m, n) int64 that ``store_grid`` stored."""
    m, n = stored.shape
    if stored.kind.startswith("gguf-"):
        codes, scale = read_blocks(parts[""], stored.kind)
        bits = 4 if stored.kind == "gguf-q4_0" else 8
        spec = GridSpec(bits=bits, symmetric=True, group=32, block=stored.kind)
        return Grid(spec, n, scale.double(), None), codes.long()
    spec = GridSpec(**{key: stored.facts[key] for key in ("bits", "symmetric", "group")})
    flat = unpack_codes(parts["codes"], spec.bits, m * n)
    codes = (flat.to(torch.int16) - (1 << (spec.bits - 1))).long().view(m, n)
    offset = None if spec.symmetric else parts["offsets"].double()
    return Grid(spec, n, parts["scales"].double(), offset), codes


def read_grid(container: Container, name: str) -> GridMatrix:
    """The integers and scales of a weight that is stored on a grid or in llama.cpp's blocks.

    Raises ``UserError`` where the file is damaged or the weight is of another kind.
    """
    stored = container.header.weights[name]
    parts = ["codes", "scales", *([] if stored.facts.get("symmetric", True) else ["offsets"])]
    if stored.kind.startswith("gguf-"):
        parts = [""]
    elif stored.kind != "grid":
        raise UserError(f"{name} of {container.path} is stored as {stored.kind}, not on a grid")
    grid, codes = grid_of(stored, {part: container.tensor(name, part) for part in parts})
    half = torch.float16
    return GridMatrix(
        codes=codes.to(torch.int8),
        scale=grid.scale.to(half),
        offset=None if grid.offset is None else grid.offset.to(half),
        group=grid.spec.group or stored.shape[1],
        bits=grid.spec.bits,
    )


def _read_plain(container: Container, name: str, stored: Stored) -> Tensor:
    return container.tensor(name).float()


def _read_on_grid(container: Container, name: str, stored: Stored) -> Tensor:
    return read_grid(container, name).dense()


def _read_coded(container: Container, name: str, stored: Stored) -> Tensor:
    data = container.tensor(name).numpy().tobytes()
    points = unpack(data).codec != coded.NAME
    return torch.from_numpy(coding.decode(data) if points else coded.decode(data))


def store_fixed(matrix: FixedMatrix) -> tuple[Stored, Parts]:
    """Indices and scales of a fixed-rate codebook."""
    shape = (int(matrix.codes.shape[0]), int(matrix.codes.shape[1]))
    return Stored(kind="fixed", shape=shape, facts=asdict(matrix.spec)), matrix.parts()


def _read_fixed(container: Container, name: str, stored: Stored) -> Tensor:
    return read_fixed(container, name).dense()


def read_fixed(container: Container, name: str, rows: Tensor | slice = slice(None)) -> FixedMatrix:
    """A weight on a fixed-rate codebook, or ``rows`` of it alone: nothing is decoded for the others.

    Raises ``UserError`` where the file is damaged or the weight is of another kind. Rows of a rotated
    weight are those of the rotated one.
    """
    stored = container.header.weights[name]
    if stored.kind != "fixed":
        raise UserError(f"{name} of {container.path} is stored as {stored.kind}, in no codebook")
    spec = FixedSpec(**{key: stored.facts[key] for key in ("lattice", "bits", "group")})
    codes, scales = container.tensor(name, "codes"), container.tensor(name, "scales")
    return from_parts(spec, stored.shape[1], codes[rows], scales[rows])


def _read_sparse(container: Container, name: str, stored: Stored) -> Tensor:
    return read_sparse(stored, {part: container.tensor(name, part) for part in part_names(stored)})


def _read_table(container: Container, name: str, stored: Stored) -> Tensor:
    return torch.from_numpy(codecs.decode(container.tensor(name).numpy().tobytes()))


_READERS: dict[str, Callable[[Container, str, Stored], Tensor]] = {
    "plain": _read_plain,
    "grid": _read_on_grid,
    "gguf-q4_0": _read_on_grid,
    "gguf-q8_0": _read_on_grid,
    "coded": _read_coded,
    "points": _read_coded,
    "fixed": _read_fixed,
    "sparse": _read_sparse,
    "table": _read_table,
}


def read_weight(container: Container, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """One weight of the file as a dense tensor; nothing else is read.

    Raises ``UserError`` where the file is damaged or of a kind that this version does not know.
    """
    stored = container.header.weights[name]
    if stored.kind not in _READERS:
        raise UserError(f"{container.path} stores {name} as {stored.kind!r}: update cllm")
    try:
        tensor = _READERS[stored.kind](container, name, stored)
        rotation = stored_rotation(stored.facts, stored.shape)
        tensor = tensor if rotation is None else rotation.undo(tensor)
    except ValueError as error:
        raise UserError(f"{container.path} is damaged ({name}: {error})") from error
    if tuple(tensor.shape) != stored.shape:
        raise UserError(f"{container.path} is damaged ({name} has shape {tuple(tensor.shape)})")
    return tensor.to(dtype)


def read_state(container: Container, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """All weights by the model's parameter names, dense in ``dtype``: what ``load_state_dict`` takes.

    Buffers (a batch norm's running averages, a composed table's incidence) keep their own dtype.
    """
    return {
        name: read_weight(container, name, _own(container.header.weights[name].facts, dtype))
        for name in container
    }


def read_integers(container: Container) -> dict[str, GridMatrix]:
    """The matrices that are integers with scales, by name, where all matrices of the layers are; else
    none. Of tables those that are stored as rows of integers are among them.

    Integers of a rotated matrix are not the matrix's own.
    """
    found: dict[str, GridMatrix] = {}
    for name, stored in container.header.weights.items():
        if stored.kind in GRIDS and "hadamard" not in stored.facts:
            found[name] = read_grid(container, name)
        elif stored.kind == "table":
            table = _rows_of(container, name, stored)
            found |= {} if table is None else {name: table}
        elif name.startswith("layers.") and len(stored.shape) == 2:
            return {}
    return found


def _rows_of(container: Container, name: str, stored: Stored) -> GridMatrix | None:
    """A table that is stored as rows of integers; none for one of another codec."""
    frame = unpack(container.tensor(name).numpy().tobytes())
    if frame.codec != codecs.Rows.name:
        return None
    bits, scales, integers = rows.parts(frame.body, frame.shape)
    return GridMatrix(
        codes=torch.from_numpy(integers),
        scale=torch.from_numpy(scales.copy())[:, None],
        offset=None,
        group=stored.shape[1],
        bits=bits,
    )


def _own(facts: dict[str, Any], dtype: torch.dtype) -> torch.dtype:
    return getattr(torch, facts["buffer"]) if "buffer" in facts else dtype


def read_packed(container: Container) -> dict[str, GridMatrix | Tensor]:
    """All weights, those on a grid as integers with their scales, the others (rotated ones, too) dense in
    float32."""
    return {
        name: read_grid(container, name)
        if stored.kind in GRIDS and "hadamard" not in stored.facts
        else read_weight(container, name, _own(stored.facts, torch.float32))
        for name, stored in container.header.weights.items()
    }

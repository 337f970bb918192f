"""A matrix on a grid to what the container holds, and every stored weight back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from cllm.compress import codecs, coded
from cllm.compress.codecs.frame import unpack
from cllm.compress.grids import Grid, GridSpec
from cllm.compress.lattices import coding
from cllm.compress.lattices.fixed import FixedMatrix, FixedSpec, from_parts
from cllm.compress.rotation import stored_rotation
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


def read_grid(container: Container, name: str) -> GridMatrix:
    """The integers and scales of a weight that is stored on a grid or in llama.cpp's blocks.

    Raises ``UserError`` where the file is damaged or the weight is of another kind.
    """
    stored = container.header.weights[name]
    m, n = stored.shape
    if stored.kind.startswith("gguf-"):
        codes, scale = read_blocks(container.tensor(name), stored.kind)
        bits = 4 if stored.kind == "gguf-q4_0" else 8
        return GridMatrix(codes=codes, scale=scale, offset=None, group=32, bits=bits)
    if stored.kind != "grid":
        raise UserError(f"{name} of {container.path} is stored as {stored.kind}, not on a grid")
    spec = GridSpec(**{key: stored.facts[key] for key in ("bits", "symmetric", "group")})
    flat = unpack_codes(container.tensor(name, "codes"), spec.bits, m * n)
    codes = (flat.to(torch.int16) - (1 << (spec.bits - 1))).to(torch.int8).view(m, n)
    offset = None if spec.symmetric else container.tensor(name, "offsets")
    scale = container.tensor(name, "scales")
    return GridMatrix(
        codes=codes, scale=scale, offset=offset, group=spec.group or n, bits=spec.bits
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


def _read_table(container: Container, name: str, stored: Stored) -> Tensor:
    return torch.from_numpy(codecs.decode(container.tensor(name).numpy().tobytes()))


_READERS: dict[str, Callable[[Container, str, Stored], Tensor]] = {
    "plain": _read_plain,
    "grid": _read_on_grid,
    "gguf-q4_0": _read_on_grid,
    "gguf-q8_0": _read_on_grid,
    "coded": _read_coded,
    "fixed": _read_fixed,
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


def _own(facts: dict[str, Any], dtype: torch.dtype) -> torch.dtype:
    return getattr(torch, facts["buffer"]) if "buffer" in facts else dtype


def read_packed(container: Container) -> dict[str, GridMatrix | Tensor]:
    """All weights, those on a grid as integers with their scales, the others (rotated ones, too) dense in
    float32."""
    return {
        name: read_grid(container, name)
        if stored.kind in ("grid", "gguf-q4_0", "gguf-q8_0") and "hadamard" not in stored.facts
        else read_weight(container, name, _own(stored.facts, torch.float32))
        for name, stored in container.header.weights.items()
    }

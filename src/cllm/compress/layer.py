"""One weight of a model, compressed: what the file holds of it, and what it reads back as."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cllm.compress import codecs
from cllm.compress.calibration import Layer
from cllm.compress.coded_fit import fit_coded
from cllm.compress.formats import CASTS, Parts, store_fixed, store_grid, store_plain
from cllm.compress.grids import Grid, GridSpec, as_stored
from cllm.compress.lattices.fixed_fit import fit_fixed
from cllm.compress.prepared import prepared, turned
from cllm.compress.problem import checked_metric, objective, problem
from cllm.compress.pruning import parse_pattern, prune_on_grid, prune_values
from cllm.compress.scales import fit_grid
from cllm.compress.settings import Settings
from cllm.compress.sparse import read_sparse, store_sparse, store_sparse_grid
from cllm.core.errors import UserError
from cllm.model.table_statistics import TableStatistics
from cllm.store.container import Stored

BEFORE_RECOVERY = 0.99
"""Share of a coded layer's bytes that it takes at first where recovery may move its integers."""


@dataclass(frozen=True, eq=False)
class Piece:
    """A compressed weight: how it is stored, its tensors, its dense ``values``, and ``figures`` for the
    report (``error``: squared error of the layer's outputs over their squared size)."""

    stored: Stored
    parts: Parts
    values: Tensor
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(part.numel() * part.element_size() for part in self.parts.values())


def compress_layer(layer: Layer, settings: Settings, bits: float | None = None) -> Piece:
    """A linear layer by ``settings``, at ``bits`` a weight instead of theirs where given.

    Raises ``UserError`` for a matrix that the grid's blocks do not fit and a rate below what is possible.
    """
    seen, whole = checked_metric(layer.seen), turned(layer, settings)
    weight, metric = whole.weight, whole.metric
    original = layer.linear.weight.detach().float()
    size = float(objective(original, torch.zeros_like(original), seen).sum())
    damping = 0.01
    try:
        if settings.prune:
            made = _pruned(weight, metric, damping, settings)
        elif settings.is_fixed:
            damping = whole.damping(settings)
            made = _fixed(weight, metric, damping, settings)
        elif settings.is_coded:
            damping = whole.damping(settings)
            rate = settings.bits if bits is None else bits
            made = _coded(weight, metric, damping, settings, rate, layer.outer)
        else:
            spec = settings.grid_spec
            spec.check_shape((int(weight.shape[0]), int(weight.shape[1])))
            damping = whole.damping(settings)
            made = _on_grid(weight, metric, damping, settings, spec, layer.outer)
    except ValueError as error:
        raise UserError(f"{layer.name}: {error}") from error
    stored, parts, values = made
    values = whole.back(values)
    if whole.rotation is not None:
        stored = replace(stored, facts=stored.facts | whole.rotation.facts())
    lost = float(objective(original, values, seen).sum()) / max(size, 1e-300)
    figures: dict[str, Any] = {"error": lost, "damping": damping}
    if stored.kind == "coded":
        figures["room"] = int((settings.bits if bits is None else bits) * weight.numel() / 8)
    return Piece(stored, parts, values, figures)


def _on_grid(
    weight: Tensor,
    metric: Tensor,
    damping: float,
    settings: Settings,
    spec: GridSpec,
    outer: Tensor | None,
) -> tuple[Stored, Parts, Tensor]:
    ready = prepared(weight, metric, damping, settings, outer)
    grid, codes = fit_grid(ready, spec, settings.decoder, scales=settings.scales)
    stored, parts = store_grid(grid, codes)
    return stored, parts, grid.values(codes)


def _pruned(
    weight: Tensor, metric: Tensor, damping: float, settings: Settings
) -> tuple[Stored, Parts, Tensor]:
    pattern = parse_pattern(settings.prune)
    order = pattern.order or settings.order
    ready = problem(weight, metric, damping=damping, order=order, dtype=torch.float32)
    if settings.method in CASTS:
        kept, values = prune_values(ready, pattern)
        stored, parts = store_sparse(kept, values, CASTS[settings.method], settings.method)
    else:
        kept, grid, codes = prune_on_grid(ready, pattern, settings.grid_spec)
        stored, parts = store_sparse_grid(kept, grid, codes)
    return stored, parts, read_sparse(stored, parts)


def _coded(
    weight: Tensor,
    metric: Tensor,
    damping: float,
    settings: Settings,
    bits: float,
    outer: Tensor | None,
) -> tuple[Stored, Parts, Tensor]:
    ready = prepared(weight, metric, damping, settings, outer)
    target = int(bits * weight.numel() / 8)
    if settings.recover and settings.recover_codes:
        target = int(BEFORE_RECOVERY * target)
    matrix, data = fit_coded(ready, target, settings.decoder, settings.coded_spec)
    stored = Stored(kind="coded", shape=(int(weight.shape[0]), int(weight.shape[1])))
    return stored, {"": as_bytes(data)}, torch.from_numpy(matrix.dense())


def _fixed(
    weight: Tensor, metric: Tensor, damping: float, settings: Settings
) -> tuple[Stored, Parts, Tensor]:
    ready = prepared(weight, metric, damping, settings)
    matrix = fit_fixed(ready, settings.fixed_spec, by_metric=settings.method != "rtn")
    stored, parts = store_fixed(matrix)
    return stored, parts, matrix.dense()


def as_bytes(data: bytes) -> Tensor:
    """``data`` as a uint8 tensor."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def compress_table(
    weight: Tensor,
    settings: Settings,
    seen: TableStatistics | None,
    *,
    head: bool,
    look_up: bool,
    bits: float | None = None,
) -> Piece:
    """A token table (V, r) by ``settings.table``, at ``bits`` a number in place of the settings' if given;
    ``seen`` is ``None`` where rows are no tokens' vectors.

    ``head``, ``look_up``: what the table is used for. Raises ``UserError`` where the bytes are too few.
    """
    if settings.table_as in CASTS:
        stored, parts = store_plain(weight, settings.table_as)
        return piece_with_error(weight, stored, parts, parts[""].float())
    if settings.table_as == "int8":
        codec: codecs.Codec = codecs.Rows(bits=8)
    else:
        rate = settings.table_bits if bits is None else bits
        codec = codecs.Lattice(target_bytes=round(rate * weight.numel() / 8))
    metric = None
    if seen is not None:
        try:
            metric = codecs.table_metric(seen.moment, head=head, look_up=look_up)
        except ValueError as error:
            raise UserError(f"the token table cannot be stored so: {error}") from error
    try:
        data = codec.encode(
            weight.numpy(), metric, frequency=None if seen is None else seen.frequency
        )
    except ValueError as error:
        raise UserError(f"the token table cannot be stored so: {error} (--table-bits)") from error
    values = torch.from_numpy(np.array(codecs.decode(data)))
    stored = Stored(kind="table", shape=(int(weight.shape[0]), int(weight.shape[1])))
    return piece_with_error(weight, stored, {"": as_bytes(data)}, values)


def piece_with_error(weight: Tensor, stored: Stored, parts: Parts, values: Tensor) -> Piece:
    """A matrix that reads as ``values`` once it is stored, with its relative squared error."""
    size = max(float(weight.double().square().sum()), 1e-300)
    error = float((weight - values).double().square().sum()) / size
    return Piece(stored, parts, values, {"error": error})


def keep(tensor: Tensor, settings: Settings, *, buffer: bool) -> Piece:
    """A small weight (norms, biases, positions) in fp16, or in the cast's precision; a buffer as it is."""
    if buffer or tensor.dtype.is_floating_point is False:
        facts = {"buffer": str(tensor.dtype).removeprefix("torch.")}
        stored = Stored(kind="plain", shape=tuple(tensor.shape), facts=facts)
        return Piece(stored, {"": tensor.detach().clone()}, tensor.detach().clone())
    cast = settings.method if settings.is_cast and settings.method in CASTS else "fp16"
    if cast == "fp16" and float(tensor.detach().abs().max()) > 65504:
        cast = "fp32"
    stored, parts = store_plain(tensor, cast)
    return Piece(stored, parts, parts[""].float())


def cast_layer(weight: Tensor, settings: Settings) -> Piece:
    """A linear layer that is only cast; to ``int8`` by rounding to the nearest, a scale for each row."""
    if settings.method == "int8":
        scale = as_stored(weight.double().abs().amax(dim=1, keepdim=True) / 127)
        grid = Grid(GridSpec(bits=8, group=0), weight.shape[1], scale, None)
        codes = (weight.double() / torch.where(scale == 0, 1.0, scale)).round().clamp(-127, 127)
        codes = codes.long()
        stored, parts = store_grid(grid, codes)
        return piece_with_error(weight, stored, parts, grid.values(codes))
    stored, parts = store_plain(weight, settings.method)
    return piece_with_error(weight, stored, parts, parts[""].float())

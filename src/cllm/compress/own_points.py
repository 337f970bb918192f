"""Token tables that were trained on a lattice, stored as the integers that they are."""

from __future__ import annotations

import numpy as np
import torch

from cllm.compress.coded import CodedMatrix, encode
from cllm.compress.layer import Piece, as_bytes, piece_with_error
from cllm.core.config import Config
from cllm.core.errors import UserError
from cllm.model.embedding import Embedding
from cllm.model.transformer import Transformer
from cllm.store.container import Stored

LARGEST = 2**30
"""Above the integers that a coded matrix holds."""


def has_own_points(config: Config) -> bool:
    """Whether the coordinates that a run's tables hold are points of a lattice. (Those of a composed table
    are sums of what it holds.)"""
    embedding = config.model.embedding
    return embedding.lattice != "none" and not embedding.is_composed


def own_points(table: Embedding) -> Piece:
    """The points next to the coordinates of ``table``, which are what the model computes with, as entropy
    coded integers: nothing is rounded. Raises ``UserError`` for coordinates that have no point."""
    assert table.snap is not None
    assert table.incidence is None
    with torch.no_grad():
        points = table.core().detach().float()
    unit = np.float32(table.snap.unit)
    if not float(points.abs().max()) < float(unit) * LARGEST:  # NaN is not, either
        raise UserError(
            "the table's coordinates are no points of its lattice: they are NaN or too large; compress an "
            "earlier checkpoint of the run"
        )
    integers = table.snap.integers(points).numpy()
    octaves = np.zeros(integers.shape[1], dtype=np.int64)
    matrix = CodedMatrix(integers=integers, step=float(unit), octaves=octaves)
    values = torch.from_numpy(matrix.dense())
    rows, columns = map(int, integers.shape)
    stored = Stored(kind="points", shape=(rows, columns))
    return piece_with_error(points, stored, {"": as_bytes(encode(matrix))}, values)


def bits_of_points(model: Transformer) -> float:
    """Bits a number of the tables of ``model``, stored so."""
    pieces = [own_points(table) for table in model.tables.values()]
    data = sum(piece.parts[""].numel() for piece in pieces)
    return 8 * data / sum(piece.values.numel() for piece in pieces)

"""Principal components cut after training, their coordinates in int8: the usual way to fewer dimensions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cllm.compress.codecs.frame import Reader, as_table, pack, unpack
from cllm.compress.codecs.rows import Rows
from cllm.compress.codecs.rows import decode as decode_rows
from cllm.model.table_metric import as_metric, roots


@dataclass(frozen=True, kw_only=True)
class Pca:
    """The ``rank`` leading components of the centred table (under the metric, where there is one).

    Coordinates are int8 rows, mean and components float16; all are counted. ``frequency`` is accepted
    and not used. A rank beyond what the table has is taken as that.
    """

    rank: int

    name = "pca"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"the rank must be at least 1, not {self.rank}")

    def encode(self, array: Any, metric: Any = None, *, frequency: Any = None) -> bytes:
        """``array`` (V, D) as bytes. ``ValueError`` for what is no table or no metric."""
        table = as_table(array)
        rank = min(self.rank, *table.shape)
        root, inverse = roots(as_metric(metric, width=table.shape[1]))
        mean = table.mean(axis=0, dtype=np.float64)
        # Eckart & Young 1936, in the coordinates in which the metric is the identity.
        _, _, directions = np.linalg.svd((table - mean) @ root, full_matrices=False)
        components = directions[:rank] @ inverse
        coordinates = (table - mean) @ root @ directions[:rank].T
        inner = Rows(bits=8, trials=1).encode(coordinates)
        with np.errstate(over="ignore"):
            halves = np.concatenate([mean, components.ravel()]).astype("<f2")
        if not np.isfinite(halves).all():
            raise ValueError(f"the table of shape {table.shape} is beyond float16; divide it first")
        return pack(self.name, table.shape, rank.to_bytes(4, "little") + halves.tobytes() + inner)


def decode(body: bytes, shape: tuple[int, int]) -> np.ndarray:
    """The (V, D) float32 table of ``Pca.encode``. ``ValueError`` for bytes that are no such thing."""
    rows, columns = shape
    reader = Reader(body)
    rank = reader.number("<I")
    if not 1 <= rank <= min(shape):
        raise ValueError(f"damaged table: rank {rank} of a table of shape {shape}")
    mean = reader.array("<f2", columns).astype(np.float32)
    components = reader.array("<f2", rank * columns).astype(np.float32).reshape(rank, columns)
    inner = unpack(reader.take(len(body) - reader.place))
    if inner.codec != Rows.name or inner.shape != (rows, rank):
        raise ValueError("damaged table: its coordinates have another shape")
    if not (np.isfinite(mean).all() and np.isfinite(components).all()):
        raise ValueError("damaged table: its components are not finite")
    return decode_rows(inner.body, inner.shape) @ components + mean

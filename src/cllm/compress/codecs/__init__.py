"""Codecs of tables and weights: an array (V, D) to bytes and back.

``Lattice`` is the house's own; ``Rows`` and ``Pca`` are what others do. All bytes describe themselves:
``decode`` needs nothing else, and refuses what is damaged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from cllm.compress.codecs import lattice, pca, rows
from cllm.compress.codecs.frame import unpack
from cllm.compress.codecs.lattice import Lattice
from cllm.compress.codecs.pca import Pca
from cllm.compress.codecs.rows import Rows
from cllm.model.table_metric import table_metric

__all__ = ["CODECS", "Codec", "Lattice", "Pca", "Rows", "decode", "table_metric"]


class Codec(Protocol):
    """What turns an array into bytes; its rate is among its own fields."""

    @property
    def name(self) -> str:
        """What the bytes name it by."""

    def encode(self, array: Any, metric: Any = None, *, frequency: Any = None) -> bytes:
        """The (V, D) array as bytes, ``metric`` (D, D) and ``frequency`` (V,) saying what errors cost."""


CODECS: dict[str, Callable[[bytes, tuple[int, int]], np.ndarray]] = {
    Lattice.name: lattice.decode,
    Rows.name: rows.decode,
    Pca.name: pca.decode,
}
"""Name of a codec to what decodes its body, given the shape."""


def decode(data: bytes) -> np.ndarray:
    """The (V, D) float32 array that any codec's ``encode`` wrote.

    Raises ``ValueError`` for foreign, newer, truncated or damaged bytes; ``UserError`` if ``constriction``
    is needed and not installed. Nothing is unpickled.
    """
    frame = unpack(data)
    if frame.codec not in CODECS:
        raise ValueError(f"the codec {frame.codec!r} is not known here; known: {', '.join(CODECS)}")
    return CODECS[frame.codec](frame.body, frame.shape)

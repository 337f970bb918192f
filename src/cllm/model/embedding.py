"""The token table.

Every kind of table offers ``embed(ids)``, ``logits(h)`` and ``table()``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from cllm.core.config import EmbeddingConfig


@torch.library.custom_op("cllm::add_rows", mutates_args=())
def add_rows(rows_nd: Tensor, ids_n: Tensor, size: int) -> Tensor:
    """The transpose of a look-up: a (size, D) table of zeros with ``rows_nd`` added at ``ids_n``.

    An operator of its own, because Inductor lowers the sum to atomic additions, whose order changes
    from run to run, and a training step must give the same bits twice. ATen's kernel gives each
    thread a range of rows and adds in order.
    """
    return torch.ops.aten.embedding_dense_backward(rows_nd, ids_n, size, -1, False)


@add_rows.register_fake
def _(rows_nd: Tensor, ids_n: Tensor, size: int) -> Tensor:
    return rows_nd.new_empty((size, rows_nd.shape[-1]))


class DenseEmbedding(nn.Module):
    """One learned vector for each token: a (V, D) table."""

    def __init__(self, vocab_size: int, width: int, config: EmbeddingConfig) -> None:
        super().__init__()
        self.init_std = config.random_std
        self.weight = nn.Parameter(torch.empty(vocab_size, width))

    def start(self, generator: torch.Generator) -> None:
        """Fill the table with its random start."""
        nn.init.normal_(self.weight, std=self.init_std, generator=generator)

    def set_table(self, table_vd: Tensor) -> None:
        """Begin with the (V, D) ``table_vd``."""
        with torch.no_grad():
            self.weight.copy_(table_vd)

    def embed(self, ids: Tensor) -> Tensor:
        """Vectors of ``ids``: (…,) -> (…, D)."""
        return functional.embedding(ids, self.weight)

    def logits(self, h_nd: Tensor) -> Tensor:
        """Scores (N, V) of hidden vectors (N, D)."""
        return h_nd @ self.weight.T

    def table(self) -> Tensor:
        """The (V, D) table itself."""
        return self.weight

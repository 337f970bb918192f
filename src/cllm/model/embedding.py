"""The token table: look-up with a gradient that is summed in one fixed order.

Inductor lowers the gradient of an embedding to atomic additions, whose order changes from run to run;
a training step must give the same bits twice, so the look-up is an operator of its own, whose backward
is ATen's, where each thread owns a range of rows.

Every kind of table offers ``embed(ids)``, ``logits(h, rows=None)``, ``table()`` and ``after_step()``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cllm.core.config import EmbeddingConfig


@torch.library.custom_op("cllm::take_rows", mutates_args=())
def take_rows(table_vd: Tensor, ids: Tensor) -> Tensor:
    """Rows of a table: (V, D) and integer ids of any shape -> ids.shape + (D,)."""
    return torch.nn.functional.embedding(ids, table_vd)


@take_rows.register_fake
def _(table_vd: Tensor, ids: Tensor) -> Tensor:
    return table_vd.new_empty((*ids.shape, table_vd.shape[1]))


@torch.library.custom_op("cllm::add_rows", mutates_args=())
def add_rows(rows_nd: Tensor, ids_n: Tensor, size: int) -> Tensor:
    """The transpose of ``take_rows``: a (size, D) table of zeros with ``rows_nd`` added at ``ids_n``."""
    return torch.ops.aten.embedding_dense_backward(rows_nd, ids_n, size, -1, False)


@add_rows.register_fake
def _(rows_nd: Tensor, ids_n: Tensor, size: int) -> Tensor:
    return rows_nd.new_empty((size, rows_nd.shape[-1]))


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    table_vd, ids = inputs
    ctx.save_for_backward(ids)
    ctx.size = table_vd.shape[0]


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    (ids,) = ctx.saved_tensors
    return add_rows(grad.contiguous(), ids, ctx.size), None


take_rows.register_autograd(_backward, setup_context=_save_for_backward)


class DenseEmbedding(nn.Module):
    """One learned vector for each token: a (V, D) table."""

    def __init__(self, vocab_size: int, width: int, config: EmbeddingConfig) -> None:
        super().__init__()
        self.init_std = config.init_std
        self.weight = nn.Parameter(torch.empty(vocab_size, width))

    def start(self, generator: torch.Generator) -> None:
        """Fill the table with its random start."""
        nn.init.normal_(self.weight, std=self.init_std, generator=generator)

    def embed(self, ids: Tensor) -> Tensor:
        """Vectors of ``ids``: (…,) -> (…, D)."""
        return take_rows(self.weight, ids)

    def logits(self, h_nd: Tensor, rows: Tensor | None = None) -> Tensor:
        """Scores (N, V) of hidden vectors (N, D), or (N, len(rows)) for some rows of the table."""
        table = self.weight if rows is None else self.weight[rows]
        return h_nd @ table.T

    def table(self) -> Tensor:
        """The (V, D) table itself."""
        return self.weight

    def after_step(self) -> None:
        """Called after each optimizer step, for kinds that cache a product; a dense table has none."""

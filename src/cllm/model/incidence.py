"""Tokens as sums of pieces: the sparse incidence (V, P), of which only the non-zeros exist."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from cllm.model.operator import fake, operator

if TYPE_CHECKING:
    from scipy import sparse


@operator(
    "sum_rows(Tensor table, Tensor indices, Tensor offsets, Tensor back_indices, Tensor back_offsets)"
    " -> Tensor"
)
def sum_rows(
    table: Tensor, indices: Tensor, offsets: Tensor, back_indices: Tensor, back_offsets: Tensor
) -> Tensor:
    """Sums of a table's rows, bag by bag: (P, r) -> (V, r), added in the order of ``indices``.

    ``offsets`` (V + 1,) bounds each bag in ``indices``; the ``back_`` pair is the transposed incidence,
    with which the gradient is the same operation and its order of additions as fixed.
    """
    # One operator that Inductor does not look into, as for `add_rows`.
    return functional.embedding_bag(indices, table, offsets, mode="sum", include_last_offset=True)


@fake("sum_rows")
def _(
    table: Tensor, indices: Tensor, offsets: Tensor, back_indices: Tensor, back_offsets: Tensor
) -> Tensor:
    return table.new_empty((offsets.shape[0] - 1, table.shape[1]))


def _keep(ctx: object, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.transposed = (*inputs[3:], *inputs[1:3])  # type: ignore[attr-defined]


def _backward(ctx: object, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    made = sum_rows(grad.contiguous(), *ctx.transposed)  # type: ignore[attr-defined]
    return made, None, None, None, None


torch.library.register_autograd("cllm::sum_rows", _backward, setup_context=_keep)


@dataclass(frozen=True, eq=False)
class Bags:
    """Some tokens as sums of the pieces that they use, as CSR without values.

    ``indices`` (n,) and ``offsets`` (tokens + 1,): each token's pieces; the ``back_`` pair: each piece's
    tokens.
    """

    indices: Tensor
    offsets: Tensor
    back_indices: Tensor
    back_offsets: Tensor

    def sums(self, rows: Tensor) -> Tensor:
        """Tokens' rows of the pieces' (p, r) -> (tokens, r)."""
        made: Tensor = sum_rows(
            rows.contiguous(), self.indices, self.offsets, self.back_indices, self.back_offsets
        )
        return made

    def transposed(self) -> Bags:
        """Pieces as sums of the tokens that have them, with which a gradient goes back."""
        return Bags(self.back_indices, self.back_offsets, self.indices, self.offsets)


class Incidence(nn.Module):
    """Which pieces (columns) make up each token (rows), as buffers of a checkpoint.

    Stored as CSR without values (each is 1): ``indices`` (nonzeros,) and ``offsets`` (V + 1,), int32. The
    transposed arrays follow from these and are not saved.
    """

    indices: Tensor
    offsets: Tensor
    back_indices: Tensor
    back_offsets: Tensor

    def __init__(self, tokens: int, pieces: int, nonzeros: int) -> None:
        super().__init__()
        self.tokens, self.pieces = tokens, pieces
        self.register_buffer("indices", torch.zeros(nonzeros, dtype=torch.int32))
        self.register_buffer("offsets", torch.zeros(tokens + 1, dtype=torch.int32))
        back = torch.zeros(nonzeros, dtype=torch.int32)
        self.register_buffer("back_indices", back, persistent=False)
        back = torch.zeros(pieces + 1, dtype=torch.int32)
        self.register_buffer("back_offsets", back, persistent=False)
        self.register_load_state_dict_post_hook(lambda module, keys: module.transpose())

    def set(self, matrix: sparse.csr_matrix) -> None:
        """Take over a (V, P) matrix of zeros and ones.

        Raises ``ValueError`` if its shape or its number of ones is another than the model's, or a token
        has no piece.
        """
        shape = (self.tokens, self.pieces, len(self.indices))
        if (*matrix.shape, matrix.nnz) != shape:
            raise ValueError(
                f"an incidence of {matrix.shape[0]} tokens, {matrix.shape[1]} pieces and {matrix.nnz} "
                f"non-zeros does not fit a model made for {shape[0]}, {shape[1]} and {shape[2]}"
            )
        if (np.diff(matrix.indptr) == 0).any():
            row = int(np.flatnonzero(np.diff(matrix.indptr) == 0)[0])
            raise ValueError(f"token {row} of {shape[0]} has no piece: give it a vector of its own")
        self.indices.copy_(torch.from_numpy(matrix.indices.astype(np.int32)))
        self.offsets.copy_(torch.from_numpy(matrix.indptr.astype(np.int32)))
        self.transpose()

    def transpose(self) -> None:
        """Make the transposed arrays from ``indices`` and ``offsets``."""
        if self.indices.is_meta:
            return
        back = self.matrix().tocsc()
        back.sort_indices()
        self.back_indices.copy_(torch.from_numpy(back.indices.astype(np.int32)))
        self.back_offsets.copy_(torch.from_numpy(back.indptr.astype(np.int32)))

    def matrix(self) -> sparse.csr_matrix:
        """The (V, P) matrix, float64."""
        indices, offsets = self.indices.cpu().numpy(), self.offsets.cpu().numpy()
        shape = (self.tokens, self.pieces)
        from scipy import sparse  # generation starts sooner without it

        return sparse.csr_matrix((np.ones(len(indices)), indices, offsets), shape=shape)

    def bags(self, tokens_n: Tensor) -> tuple[Tensor, Bags]:
        """The pieces (p,) of some tokens (n,), ascending, each once; and the tokens as sums of them."""
        begin, end = self.offsets[tokens_n].long(), self.offsets[tokens_n + 1].long()
        sizes = end - begin
        offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        token = torch.repeat_interleave(sizes)
        places = torch.arange(len(token), device=token.device) - offsets[token] + begin[token]
        pieces, indices = torch.unique(self.indices[places], return_inverse=True)
        order = torch.argsort(indices, stable=True)
        back = torch.bincount(indices, minlength=len(pieces)).cumsum(0)
        back_offsets = torch.cat([back.new_zeros(1), back])
        return pieces.long(), Bags(indices, offsets, token[order], back_offsets)

    def mean_pieces(self) -> float:
        """Pieces of a token, on average."""
        return max(len(self.indices) / self.tokens, 1.0)

    def forward(self, weight_pr: Tensor) -> Tensor:
        """Tokens' rows (V, r) of pieces' rows (P, r)."""
        back = (self.back_indices, self.back_offsets)
        made: Tensor = sum_rows(weight_pr, self.indices, self.offsets, *back)
        return made

    def pull(self, grad_vr: Tensor) -> Tensor:
        """The gradient of ``forward``'s input from its output's."""
        back = (self.back_indices, self.back_offsets)
        made: Tensor = sum_rows(grad_vr, *back, self.indices, self.offsets)
        return made

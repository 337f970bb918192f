"""A start for the last layer: with it, the untrained model's logits are close to the corpus's bigrams.

At the start the residual stream holds little but the token's own vector, so that a linear map of it
can say which token comes next. Least squares find that map for given tables, and the last MLP begins as
it. What training would spend its first steps on is there from the first step on.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from cllm.model.mlp import GELU, SwiGLU
from cllm.model.norms import BatchNorm
from cllm.model.transformer import Block, Transformer

RATIO = 10.0
"""Root mean square of what the last MLP adds, as a multiple of the table's: the token's own vector, which
would predict itself, is to weigh little in the sum."""
GATE = 2.0
"""Where the gates of a SwiGLU stand at the start: open, and the unit is nearly linear in its input."""
LEAST_SMOOTHING = 0.05
_RIDGE = 1e-4


def bigram_logits(bigrams: sparse.csr_array) -> tuple[np.ndarray, np.ndarray, sparse.csr_array]:
    """(V,) frequencies p of what follows, and (V,) l and sparse (V, V) P with l_j + P_ij = log p(j | i) up
    to a constant of each row i.

    Smoothed with the frequencies as Witten & Bell (1991): p(j | i) = (1 − λ_i) b_ij / b_i + λ_i p_j with
    λ_i = kinds_i / (kinds_i + b_i). Pairs never seen then share a constant, and P is as sparse as the
    counts.
    """
    row = bigrams.sum(axis=1)
    share = bigrams.sum(axis=0) + 0.5
    share /= share.sum()
    kinds = np.diff(bigrams.indptr)
    smoothing = np.clip(kinds / np.maximum(kinds + row, 1), LEAST_SMOOTHING, 1.0)
    found = bigrams.tocoo()
    odds = (1 - smoothing) / smoothing / np.maximum(row, 1)
    values = np.log1p(odds[found.row] * found.data / share[found.col])
    lifted = sparse.coo_array((values, (found.row, found.col)), shape=bigrams.shape).tocsr()
    return share, np.log(share), lifted


def linear_map(inputs: np.ndarray, outputs: np.ndarray, bigrams: sparse.csr_array) -> np.ndarray:
    """The (D, D) map W for which ``inputs`` W ``outputs``ᵀ, each (V, D), is nearest to the bigrams' logits.

    Weighted least squares: rows by how often the first token occurs, columns by how often the second does;
    a constant of each row is free, as the softmax does not see it. No (V, V) matrix is made dense.
    """
    share, unigram, lifted = bigram_logits(bigrams)
    frequency = bigrams.sum(axis=1) / max(bigrams.sum(), 1)
    centred = outputs - share @ outputs
    weighted = centred * share[:, None]
    wanted = (
        lifted @ weighted + unigram @ weighted
    )  # the free constant is orthogonal to ``weighted``
    right = inputs.T @ (frequency[:, None] * wanted)
    first = _ridged(inputs.T @ (frequency[:, None] * inputs))
    second = _ridged(centred.T @ weighted)
    return np.linalg.solve(second, np.linalg.solve(first, right).T).T


def _ridged(gram: np.ndarray) -> np.ndarray:
    level = _RIDGE * np.trace(gram) / len(gram)
    return gram + max(level, 1e-30) * np.eye(len(gram))


def start_bigram(model: Transformer, bigrams: sparse.csr_array) -> bool:
    """Let the last MLP begin with the (V, V) ``bigrams``, for the tables as they are.

    Returns whether it was done: a batch norm's input cannot be told from the table alone.
    """
    last = cast(Block, model.layers[-1])
    if isinstance(last.mlp_norm, BatchNorm) or bigrams.nnz == 0:
        return False
    with torch.no_grad():
        table = model.embedding.table().float()
        normed = last.mlp_norm(table, None)
        inputs = normed.double().cpu().numpy()
        outputs = model.output.table().double().cpu().numpy()
        frequency = bigrams.sum(axis=1) / bigrams.sum()
        wanted = linear_map(inputs, outputs, bigrams)
        # The direction in which all inputs are nearly 1: it opens the gates.
        constant = np.linalg.solve(
            _ridged(inputs.T @ (frequency[:, None] * inputs)), inputs.T @ frequency
        )
        assert isinstance(last.mlp, SwiGLU | GELU)
        _set_linear(last.mlp, wanted, constant)
        made = last.mlp(normed).double().cpu().numpy()
        size = np.sqrt(frequency @ (made**2).mean(axis=1))
        last.mlp.out.weight.mul_(RATIO * float(table.square().mean().sqrt()) / max(size, 1e-30))
    return True


def _set_linear(mlp: SwiGLU | GELU, wanted: np.ndarray, constant: np.ndarray) -> None:
    """Make an MLP of normed vectors nearly x -> x ``wanted``, up to a factor.

    The random weights give the basis in which the inner units hold it, so that the start still depends
    on the model's seed.
    """
    out, inner = mlp.out.weight, mlp.out.weight.shape[1]
    left, values, right = np.linalg.svd(wanted)
    if isinstance(mlp, SwiGLU):
        gate, up = mlp.gate_up.weight.chunk(2)
        gate.add_(_like(constant * GATE, gate))
        units = inner
    else:
        up, units = mlp.up.weight, inner // 2
    rank = min(len(values), units)
    # (units, rank), orthonormal columns.
    basis = np.linalg.qr(up[:units, :rank].double().cpu().numpy())[0]
    reading, writing = basis @ left[:, :rank].T, (right[:rank].T * values[:rank]) @ basis.T
    if isinstance(mlp, GELU):  # gelu(z) − gelu(−z) = z exactly
        reading, writing = np.concatenate([reading, -reading]), np.hstack([writing, -writing])
    up[: len(reading)].copy_(_like(reading, up))
    out[:, : len(reading)].copy_(_like(writing, out))


def _like(array: np.ndarray, tensor: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(tensor)

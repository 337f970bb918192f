"""Orders of a vocabulary's rows in memory.

A tokenizer's ids are arbitrary names, and the row of a token table that a token has is its id. So an
order of the rows is a renumbering of the tokens: ``Tokenizer.renumbered`` makes one of a permutation
of this module (``laid_out``), and nothing else of the model knows of it. Training renumbers the
tokenizer that it makes (``tokenizer.order``); one that is given keeps its ids.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

import numpy as np

from cllm.lattice.curves import hilbert_number, morton_number
from cllm.lattice.spiral_index import SpiralIndex
from cllm.text.permutation import permute
from cllm.text.tokenizer import Tokenizer

Order = Literal["tokenizer", "frequency", "ulam", "morton", "hilbert", "random"]
ORDERS: tuple[Order, ...] = get_args(Order)
LARGE = 32_768
"""Tokens from which on frequency order was measured to be the quicker (``cllm bench layout``)."""


def chosen_order(order: Literal["auto"] | Order, size: int) -> Order:
    """The order that ``auto`` stands for in a vocabulary of ``size`` tokens; any other is itself."""
    if order != "auto":
        return order
    return "frequency" if size >= LARGE else "tokenizer"


def permutation(order: Order, counts: np.ndarray, seed: int = 0) -> np.ndarray:
    """The row of each token: a permutation of range(V), int64 (V,).

    ``counts`` (V,) says how often each token occurs; equal counts keep the tokens' order. ``seed``
    decides the random order alone.

    - ``tokenizer``: row = id. Byte-level BPE numbers tokens as it merges them, which is roughly by
      frequency.
    - ``frequency``: row = rank, the most frequent token first.
    - ``ulam``: the tokens lie on the Ulam spiral by rank (Stein, Ulam & Wells 1964), and rows follow
      the cells of its square line by line, from the lowest y and x.
    - ``morton``, ``hilbert``: the tokens lie on the same spiral, and rows follow the curve of Morton
      (1966) or of Hilbert (1891) through its cells.
    - ``random``: no token's row says anything about it.

    Raises:
        ValueError: an unknown order, or counts that are no vector of at least one number.
    """
    counts = np.asarray(counts)
    if counts.ndim != 1 or not counts.size:
        raise ValueError(f"counts must have shape (V,) with V at least 1, got {counts.shape}")
    if order not in ORDERS:
        raise ValueError(f"order must be one of {ORDERS}, got {order!r}")
    size = len(counts)
    if order == "tokenizer":
        return np.arange(size)
    if order == "random":
        return permute(np.arange(size), size, seed, 0)
    by_rank = np.argsort(-counts.astype(np.float64), kind="stable")
    row_of_rank = np.arange(size) if order == "frequency" else _rows_of_ranks(order, size)
    rows = np.empty(size, dtype=np.int64)
    rows[by_rank] = row_of_rank
    return rows


def laid_out(tokenizer: Tokenizer, order: Order, texts: Iterable[str], seed: int = 0) -> Tokenizer:
    """The tokenizer with its ids in ``order`` by how often the tokens occur in ``texts``.

    Special tokens keep their ids; the others share out the rest. Texts are cut as before, and the
    tokens are the same but for their numbers.
    """
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for text in texts:
        counts += np.bincount(tokenizer.encode(text), minlength=len(counts))
    plain = np.setdiff1d(np.arange(len(counts)), sorted(tokenizer.special_ids))
    new_ids = np.arange(len(counts))
    new_ids[plain] = plain[permutation(order, counts[plain], seed)]
    return tokenizer.renumbered(new_ids)


def _rows_of_ranks(order: Order, size: int) -> np.ndarray:
    """Places of the numbers 1 … size of the Ulam spiral along a curve through its cells."""
    cells = SpiralIndex(size, "ulam").positions.astype(np.int64)
    x, y = (cells - cells.min(axis=0)).T
    side = int(max(x.max(), y.max())) + 1
    if order == "ulam":
        along = y * side + x
    elif order == "morton":
        along = morton_number(x, y)
    else:
        along = hilbert_number(x, y, max(1, (side - 1).bit_length()))
    rows = np.empty(size, dtype=np.int64)
    rows[np.argsort(along)] = np.arange(size)
    return rows

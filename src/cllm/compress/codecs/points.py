"""Points of a basis's lattice: integers one by one (Z), or E8 and Leech blocks of consecutive columns.

What is stored of either are integers; a block's are in the units of ``cllm.compress.lattices.blocks``.
The coders of blocks build on this package's entropy coder, hence the imports inside.
"""

from __future__ import annotations

import numpy as np

from cllm.compress.codecs.entropy import decode_integers, encode_integers
from cllm.compress.codecs.frame import Reader
from cllm.compress.codecs.rate import TooFineError

LATTICES = ("z", "e8", "leech")
BLOCK = 8  # columns of the smallest block
# Times that decisions are taken anew with the costs of those before.
PASSES = 2
# Beyond so large coefficients float32, in which blocks are searched, is too coarse.
WIDEST = 2**20


def decide_blocks(
    rows: np.ndarray, targets: np.ndarray, price: float, *, lattice: str, beams: int
) -> np.ndarray:
    """Integers (V, k), float64, whose points are blocks of ``lattice`` and lie near ``targets`` (V, D).

    ``rows`` (k, D): the basis, units included; ``price``: of a bit, in squared distance. K-best over each
    block's chain of residues, then again with what the bits of the points found cost. Raises
    ``TooFineError`` for integers beyond what float32 holds.
    """
    import torch

    from cllm.compress.decoders.block_beam import k_best_blocks
    from cllm.compress.lattices.blocks import block_numbers, units
    from cllm.compress.lattices.fit import price_like
    from cllm.compress.problem import problem

    count = len(rows)
    if not count:
        return np.zeros((len(targets), 0))
    coefficients = np.linalg.lstsq(rows.T, targets.T, rcond=None)[0].T
    if np.abs(coefficients).max() >= WIDEST:
        raise TooFineError(f"blocks of {lattice}: integers pass 20 bits")
    # A constant scale, so that float32 holds the squares whatever the table's unit.
    scale = float(np.abs(np.diag(rows @ rows.T)).mean())
    work = problem(
        coefficients,
        rows @ rows.T / scale,
        damping=0.0,
        order="natural",
        dtype=torch.float32,
        blocks=block_numbers(lattice, count),
    )
    # Integers count the rows themselves, whose units are those of the lattice.
    steps = torch.from_numpy(1 / units(lattice, count))
    found = k_best_blocks(work, lattice, steps, beams).long()
    for _ in range(PASSES if price else 0):
        cost = price_like(found.numpy(), price / scale, torch.float32)
        found = k_best_blocks(work, lattice, steps, beams, price=cost).long()
    return found.numpy().astype(np.float64)


def encode_points(lattice: str, integers: np.ndarray) -> bytes:
    """Integers (V, k) of points as bytes; ``decode_points`` needs the lattice, V and k."""
    if lattice == "z" or not integers.size:
        return encode_integers(integers)
    from cllm.compress.lattices.coding import LatticeMatrix, encode

    octaves = np.zeros(integers.shape[1], dtype=np.int64)
    data = encode(LatticeMatrix(lattice, integers, 1.0, octaves))
    return len(data).to_bytes(4, "little") + data


def decode_points(reader: Reader, lattice: str, rows: int, columns: int) -> np.ndarray:
    """The (rows, columns) int64 integers of ``encode_points``. ``ValueError`` for damaged bytes."""
    if lattice == "z" or not columns:
        return decode_integers(reader, rows, columns)
    from cllm.compress.lattices.coding import decode_matrix

    matrix = decode_matrix(reader.take(reader.number("<I")))
    if matrix.lattice != lattice or matrix.integers.shape != (rows, columns):
        raise ValueError(f"damaged table: its points are not {columns} columns of {lattice}")
    return matrix.integers

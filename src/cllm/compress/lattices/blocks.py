"""How a matrix's columns are shared out among blocks of lattices, and which integers make a point.

Points are integer vectors times a unit, so that every lattice has one point to a unit of volume:

- E8, units of ½: all integers even or all odd, their sum divisible by 4 (D8 and D8 + ½).
- Leech, units of 1/√8: m + 2c + 4b with m 0 or 1, c a Golay word, and a sum of 0 or, where m is 1, 4
  modulo 8 (Conway & Sloane 1999, chapter 4, section 11).

Read one coordinate after the other, a point is a chain of residues: once some are known, the next lies
in a class modulo 2 (free, but for the parity m), 4 (its Golay bit follows from others) or 8 (the sum
decides, too). Decoders and the entropy coder follow that chain.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np

from cllm.lattice.golay import golay

LATTICES = ("z", "e8", "leech")


@dataclass(frozen=True)
class Kind:
    """A lattice of blocks: ``width`` columns, integers in ``unit``, and the sum's ``modulus`` (1: any)."""

    name: str
    width: int
    unit: float
    modulus: int


Z, E8, LEECH = Kind("z", 1, 1.0, 1), Kind("e8", 8, 0.5, 4), Kind("leech", 24, 0.125**0.5, 8)
_FALLING = {"z": (Z,), "e8": (E8, Z), "leech": (LEECH, E8, Z)}


@dataclass(frozen=True)
class Run:
    """Columns ``start`` … ``stop`` − 1 in blocks of one kind."""

    kind: Kind
    start: int
    stop: int

    @property
    def blocks(self) -> int:
        """How many."""
        return (self.stop - self.start) // self.kind.width


def runs(lattice: str, columns: int) -> list[Run]:
    """The blocks of ``columns``: as many of ``lattice`` as there is room for, then of the next smaller
    lattice (24 = Leech, 8 = E8, 1 = Z). Raises ``ValueError`` for an unknown name."""
    if lattice not in LATTICES:
        raise ValueError(f"the lattice is one of {', '.join(LATTICES)}, not {lattice!r}")
    found, start = [], 0
    for kind in _FALLING[lattice]:
        stop = columns - (columns - start) % kind.width
        if stop > start:
            found.append(Run(kind, start, stop))
        start = stop
    return found


def block_numbers(lattice: str, columns: int) -> np.ndarray:
    """(columns,) int64: the block of each column."""
    sizes = [run.kind.width for run in runs(lattice, columns) for _ in range(run.blocks)]
    return np.repeat(np.arange(len(sizes)), sizes)


def units(lattice: str, columns: int) -> np.ndarray:
    """(columns,) float64: what an integer of each column is worth."""
    found = np.empty(columns)
    for run in runs(lattice, columns):
        found[run.start : run.stop] = run.kind.unit
    return found


@dataclass(frozen=True)
class Link:
    """A coordinate in the chain of a block.

    ``spacing``: the next integer lies in a class modulo this. ``bit``: a free coordinate's place among
    the Golay word's information bits, −1 where it has none. ``mask``: the information bits whose parity
    is this coordinate's Golay bit.
    """

    position: int
    spacing: int
    bit: int
    mask: int


@lru_cache(maxsize=4096)
def chain(kind: Kind, positions: tuple[int, ...]) -> tuple[Link, ...]:
    """The links of a block whose coordinates are taken in the order of ``positions``, m known."""
    last = len(positions) - 1
    if kind is Z:
        return (Link(0, 1, -1, 0),)
    if kind is E8:
        return tuple(Link(p, 4 if i == last else 2, -1, 0) for i, p in enumerate(positions))
    reduced, pivots = _echelon(_words()[:, positions])
    links = []
    for i, p in enumerate(positions):
        if i in pivots:
            links.append(Link(p, 2, pivots.index(i), 0))
        else:
            mask = int(reduced[:, i] @ (1 << np.arange(12)))
            links.append(Link(p, 8 if i == last else 4, -1, mask))
    return tuple(links)


def _echelon(words: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """The reduced echelon basis (12, 24) of a binary code, and where its rows begin: a coordinate that
    begins none is a sum of those before it."""
    # Words with a first 1 at each place: 12 of them are a basis.
    first = np.where(words.any(axis=1), words.argmax(axis=1), -1)
    pivots = np.unique(first[first >= 0]).tolist()
    basis = np.array([words[np.flatnonzero(first == i)[0]] for i in pivots])
    for row in range(len(pivots) - 1, -1, -1):
        above = np.flatnonzero(basis[:row, pivots[row]])
        basis[above] ^= basis[row]
    return basis, pivots


@cache
def _words() -> np.ndarray:
    return golay()


@cache
def parities() -> np.ndarray:
    """(4096,) uint8: the parity of the bits of every number."""
    numbers = np.arange(4096)
    return np.bitwise_xor.reduce(numbers[:, None] >> np.arange(12) & 1, axis=1).astype(np.uint8)


def is_point(kind: Kind, integers: np.ndarray) -> np.ndarray:
    """(…,) whether integers (…, width) are a point."""
    if kind is Z:
        return np.ones(integers.shape[:-1], dtype=bool)
    m = integers[..., :1] % 2
    fits: np.ndarray = (integers % 2 == m).all(axis=-1)
    if kind is E8:
        return fits & (integers.sum(axis=-1) % 4 == 0)
    word = (integers - m) // 2 % 2
    basis, _ = _echelon(_words())
    fits &= (word @ basis.T % 2 == 0).all(axis=-1)  # the code is its own dual
    return fits & ((integers.sum(axis=-1) - 4 * m[..., 0]) % 8 == 0)

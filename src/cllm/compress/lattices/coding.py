"""Matrices of lattice points, entropy coded: each coordinate given what the ones before say of it.

Independent integers do not reach a lattice's rate: E8's eight integers in half steps would cost a bit
each for their common parity, and another for their sum. Here a block's parity m comes first, then its free
coordinates, known modulo 2; those whose Golay bit follows are known modulo 4, and the last, by the sum,
modulo 4 (E8) or 8 (Leech). What is left of each is a rank, coded by ANS (``constriction``) under adaptive
counts of its residue class and of its row's and column's expected magnitude, as in ``cllm.compress.coded``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np

from cllm.compress.codecs.frame import Reader, pack, unpack
from cllm.compress.coded import Levels, column_steps, header, levels_of, read_header
from cllm.compress.lattices.blocks import Kind, Link, Run, chain, parities, runs, units
from cllm.compress.lattices.stream import ReadStream, WriteStream

NAMES = {"e8": "coded-e8", "leech": "coded-leech"}
# The first part is 1/32 of the blocks; each one doubles what is known.
_PARTS = 5
_INFORMATION = 12
"""Free bits of a Golay word, those of the coordinates that are coded first."""
_POWERS = np.exp2(np.arange(_INFORMATION), dtype=np.float32)


@dataclass(frozen=True, eq=False)
class LatticeMatrix:
    """weight[r, j] = ``step`` · 2^(``octaves``[j] / 4) · unit of column j · ``integers``[r, j].

    ``integers`` (m, n) are points of ``lattice`` (``e8``, ``leech``) block by block, see ``blocks``;
    ``octaves`` (n,) whole numbers. ``step``: the lattice's unit of volume has edges so long.
    """

    lattice: str
    integers: np.ndarray
    step: float
    octaves: np.ndarray

    def dense(self) -> np.ndarray:
        """(m, n) float32."""
        unit = units(self.lattice, self.integers.shape[1])
        steps = unit * column_steps(self.step, self.octaves)
        return self.integers.astype(np.float32) * steps.astype(np.float32)


def encode(matrix: LatticeMatrix) -> bytes:
    """The matrix as self-describing bytes with a checksum; ``decode`` gives its dense values.

    Raises ``UserError`` without ``constriction``.
    """
    m, n = matrix.integers.shape
    levels = levels_of(matrix.integers)
    head = header(matrix.step, matrix.octaves, levels)
    stream = WriteStream()
    for run in runs(matrix.lattice, n):
        _walk(stream, run, levels, matrix.integers[:, run.start : run.stop])
    return pack(NAMES[matrix.lattice], (m, n), head + stream.bytes())


def decode(data: bytes) -> np.ndarray:
    """The (m, n) float32 matrix that ``encode`` was given. Raises ``ValueError`` for damaged bytes."""
    return decode_matrix(data).dense()


def decode_matrix(data: bytes) -> LatticeMatrix:
    """The points and steps that ``encode`` was given. Raises ``ValueError`` for damaged bytes."""
    frame = unpack(data)
    lattice = next((key for key, name in NAMES.items() if name == frame.codec), None)
    if lattice is None:
        raise ValueError(f"the bytes of a matrix were written by {frame.codec!r}, no lattice coder")
    m, n = frame.shape
    reader = Reader(frame.body)
    step, octaves, levels = read_header(reader, m, n)
    stream = ReadStream(reader)
    integers = np.empty((m, n), dtype=np.int32)
    for run in runs(lattice, n):
        integers[:, run.start : run.stop] = _walk(stream, run, levels, None)
    stream.end()
    reader.end()
    return LatticeMatrix(lattice=lattice, integers=integers, step=step, octaves=octaves)


class Stream(Protocol):
    """Where coordinates go, or come from."""

    def cosets(self, classes: np.ndarray, known: np.ndarray | None) -> np.ndarray:
        """Parities 0 and 1 of blocks, ``known`` where they are written."""

    def values(
        self, spacing: int, residues: np.ndarray, classes: np.ndarray, known: np.ndarray | None
    ) -> np.ndarray:
        """Integers of classes ``residues`` modulo ``spacing``, ``known`` where they are written."""

    def learn(self) -> None:
        """Let the models take in what has gone by since the last time."""

    def stop(self) -> None:
        """Learn from nothing that follows."""


def _walk(stream: Stream, run: Run, levels: Levels, known: np.ndarray | None) -> np.ndarray:
    """Integers (m, columns of ``run``) through ``stream``: the one order that both sides keep."""
    kind, m = run.kind, len(levels.rows)
    out = np.empty((m, run.blocks, kind.width), dtype=np.int32)
    given = None if known is None else known.reshape(out.shape)
    for part in _parts(run.blocks):
        if run.start + part.stop * kind.width == len(levels.columns):
            stream.stop()
        columns = slice(run.start + part.start * kind.width, run.start + part.stop * kind.width)
        classes = levels.classes(columns).reshape(m, -1, kind.width)
        out[:, part] = _blocks(stream, kind, classes, None if given is None else given[:, part])
        stream.learn()
    return out.reshape(m, -1)


def _parts(count: int) -> Iterator[slice]:
    begin = 0
    for k in range(_PARTS, -1, -1):
        end = max(count >> k, min(begin + 1, count)) if k else count
        if end > begin:
            yield slice(begin, end)
            begin = end


def _blocks(
    stream: Stream, kind: Kind, classes: np.ndarray, known: np.ndarray | None
) -> np.ndarray:
    """Blocks (m, blocks, width), all coordinates of one link after the other."""
    m = np.zeros(classes.shape[:2], dtype=np.int32)
    if kind.modulus > 1:
        middle = (byte_sums(classes) // kind.width).astype(np.uint8)
        m = stream.cosets(middle, None if known is None else known[..., 0] % 2)
    order, groups = _order(kind)
    laid = np.zeros(classes.shape, dtype=np.int32)  # in that order, 0 where it is not yet known
    begin = 0
    for links in groups:
        places = order[begin : begin + len(links)]
        here = None if known is None else known[..., places]
        residues = _residues(kind, links, m, laid)
        found = stream.values(links[0].spacing, residues, classes.take(places, axis=-1), here)
        laid[..., begin : begin + len(links)] = found
        begin += len(links)
    return laid.take(np.argsort(order), axis=-1)


def byte_sums(lines: np.ndarray) -> np.ndarray:
    """(…,) uint64 sums of the last axis of bytes (…, width), contiguous: the eight bytes of a word are
    added in 16-bit lanes, since numpy sums short axes slowly. ``width`` is a multiple of 8."""
    words = lines.view(np.uint64)
    low, every = np.uint64(0x00FF00FF00FF00FF), np.uint64(0x0001000100010001)
    pairs = (words & low) + (words >> np.uint64(8) & low)
    sums = pairs * every >> np.uint64(48)
    total = sums[..., 0].copy()
    for i in range(1, sums.shape[-1]):
        total += sums[..., i]
    return total


@cache
def _order(kind: Kind) -> tuple[np.ndarray, list[tuple[Link, ...]]]:
    """Positions in the order in which they are coded, and their links: those of one spacing together, the
    free ones first, as none of them follows from another of them."""
    links = chain(kind, tuple(range(kind.width)))
    spacings = sorted({link.spacing for link in links})
    groups = [tuple(link for link in links if link.spacing == s) for s in spacings]
    return np.array([link.position for group in groups for link in group]), groups


def _residues(kind: Kind, links: tuple[Link, ...], m: np.ndarray, laid: np.ndarray) -> np.ndarray:
    """(…, links) uint8: what is known of coordinates modulo their spacing, (…, 1) where it is the same for
    all. ``laid``: the coordinates before them, and zeros."""
    spacing = links[0].spacing
    if spacing == kind.modulus and kind.modulus > 1:
        total = byte_sums(laid.astype(np.uint8)).astype(np.int32)
        left = (4 * m if kind.modulus == 8 else 0) - total
        return (left & (kind.modulus - 1)).astype(np.uint8)[..., None]
    same = m.astype(np.uint8)[..., None]
    if spacing < 4:
        return same
    checks = _checks(links)
    bits = (laid[..., :_INFORMATION] - m[..., None]) >> 1 & 1
    # A product of floats is the quickest sum of a short axis, and exact.
    word = bits.astype(np.float32) @ _POWERS
    return checks.take(word.astype(np.int64), axis=0) + same


@cache
def _checks(links: tuple[Link, ...]) -> np.ndarray:
    """(4096, links) uint8: twice the Golay bits that follow from each word of information bits."""
    masks = np.array([link.mask for link in links])
    return 2 * parities()[np.arange(1 << _INFORMATION)[:, None] & masks]

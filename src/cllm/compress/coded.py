"""Matrices of unbounded integers times steps, entropy coded: any rate, and no box to clip at.

What is coded of an integer is the symbol of its magnitude, by asymmetric numeral systems (Duda 2013;
``constriction``), under a model that its row and its column choose: the class of an entry is the sum of
three whole numbers in thirds of an octave of expected magnitude, the matrix's, the row's and the
column's. Models learn from one block of columns to the next, by whole counts that encoder and decoder
keep alike. Signs and, of large integers, low bits are stored as they are.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal, localcontext
from functools import cache
from typing import Any

import numpy as np

from cllm.compress.bits import Bits, packed, pop_gamma, push_gamma
from cllm.compress.codecs.entropy import (
    LARGEST,
    constriction_stream,
    decode_integers,
    encode_integers,
)
from cllm.compress.codecs.frame import Reader, pack, unpack

NAME = "coded"
# Column steps are whole numbers of quarter octaves, as factors that no machine's ``pow`` decides.
_QUARTERS = (1.0, 1.189207115002721, 1.4142135623730951, 1.681792830507429)
# The first block is 1/32 of the columns; each one doubles what is known.
_BLOCKS = 5
# Magnitudes 0 … 46 have a symbol each, the last one says that more follows.
SYMBOLS = 48
ESCAPE = SYMBOLS - 1
# Classes of expected magnitude in thirds of an octave from 2^-6 on.
LOWEST = -6
CLASSES = 3 * 36
# An observation adds so many counts; the start of a model is worth as many observations.
_UNIT, _START = 32, 24


@dataclass(frozen=True, eq=False)
class CodedMatrix:
    """weight[r, j] = ``step`` · 2^(``octaves``[j] / 4) · ``integers``[r, j].

    ``integers`` (m, n) below 2^30 in magnitude; ``octaves`` (n,) whole numbers.
    """

    integers: np.ndarray
    step: float
    octaves: np.ndarray

    def steps(self) -> np.ndarray:
        """(n,) float64: the step of each column."""
        return column_steps(self.step, self.octaves)

    def dense(self) -> np.ndarray:
        """(m, n) float32."""
        return self.integers.astype(np.float32) * self.steps().astype(np.float32)


def column_steps(step: float, octaves: np.ndarray) -> np.ndarray:
    """``step`` · 2^(octaves/4), the same on every machine."""
    return step * np.ldexp(np.take(_QUARTERS, octaves % 4), octaves // 4)


def encode(matrix: CodedMatrix) -> bytes:
    """The matrix as self-describing bytes with a checksum; ``decode`` gives its dense values.

    Raises ``UserError`` without ``constriction``.
    """
    m, n = matrix.integers.shape
    levels = levels_of(matrix.integers)
    head = header(matrix.step, matrix.octaves, levels)
    return pack(NAME, (m, n), head + _encode_symbols(matrix.integers, levels))


def decode(data: bytes) -> np.ndarray:
    """The (m, n) float32 matrix that ``encode`` was given. Raises ``ValueError`` for damaged bytes."""
    return decode_matrix(data).dense()


def decode_matrix(data: bytes) -> CodedMatrix:
    """The integers and steps that ``encode`` was given. Raises ``ValueError`` for damaged bytes."""
    frame = unpack(data)
    if frame.codec != NAME:
        raise ValueError(f"the bytes of a matrix were written by {frame.codec!r}, not {NAME!r}")
    m, n = frame.shape
    reader = Reader(frame.body)
    step, octaves, levels = read_header(reader, m, n)
    integers = _decode_symbols(reader, levels)
    reader.end()
    return CodedMatrix(integers=integers, step=step, octaves=octaves)


def header(step: float, octaves: np.ndarray, levels: Levels) -> bytes:
    """What comes before the symbols: the steps, and the models' levels."""
    head = struct.pack("<fhB", step, levels.base, bool(octaves.any()))
    if octaves.any():
        head += encode_integers(octaves[:, None])
    return head + encode_integers(np.concatenate([levels.rows, levels.columns])[:, None])


def read_header(reader: Reader, m: int, n: int) -> tuple[float, np.ndarray, Levels]:
    """Step, octaves (n,) and levels. Raises ``ValueError`` for damaged bytes."""
    step, base, has_octaves = reader.number("<f"), reader.number("<h"), reader.number("<B")
    if not 0 < step < np.inf or has_octaves > 1:
        raise ValueError("damaged matrix: its step is out of range")
    octaves = np.zeros(n, dtype=np.int64)
    if has_octaves:
        octaves = decode_integers(reader, n, 1)[:, 0]
        if np.abs(octaves).max() > 400:
            raise ValueError("damaged matrix: a column's step is out of range")
    codes = decode_integers(reader, m + n, 1)[:, 0]
    return step, octaves, Levels(base=base, rows=codes[:m], columns=codes[m:])


@dataclass(frozen=True, eq=False)
class Levels:
    """Expected magnitudes, in thirds of an octave: of the whole, and what rows and columns add to it."""

    base: int
    rows: np.ndarray
    columns: np.ndarray

    def classes(self, part: slice = slice(None)) -> np.ndarray:
        """(m, columns of ``part``) uint8: the model of each entry."""
        # A level is below 2^12 in magnitude: 16 bits hold the sum.
        rows, columns = (
            np.clip(levels, -4096, 4095).astype(np.int16)
            for levels in (self.base + self.rows, self.columns[part])
        )
        total = rows[:, None] + columns[None]
        return np.clip(total, 0, CLASSES - 1, out=total).astype(np.uint8)


def levels_of(integers: np.ndarray) -> Levels:
    """The levels that fit ``integers`` (m, n)."""
    size = np.abs(integers)
    mean = float(size.mean())
    if not mean:
        zero = np.zeros(1, dtype=np.int64)
        return Levels(0, np.repeat(zero, len(size)), np.repeat(zero, size.shape[1]))

    def thirds(means: np.ndarray) -> np.ndarray:
        # A line of zeros alone is as far down as there are classes.
        return np.rint(3 * np.log2(np.maximum(means / mean, 2.0**-12))).astype(np.int64)

    base = int(np.rint(3 * (np.log2(mean) - LOWEST)))
    return Levels(base=base, rows=thirds(size.mean(axis=1)), columns=thirds(size.mean(axis=0)))


def bits_like(integers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What integers cost beside ``integers`` (m, n): classes (m, n) and bits (classes, magnitudes).

    The bits of a magnitude count its sign and low bits; beyond the table they grow by Elias' gamma code.
    """
    levels = levels_of(integers)
    classes = levels.classes()
    model = _Model()
    model.learn(classes.ravel(), np.abs(integers).ravel())
    shares = -np.log2(model.counts / model.counts.sum(axis=1, keepdims=True))
    sizes = np.arange(256)
    table = np.empty((CLASSES, len(sizes)))
    for c in range(CLASSES):
        shift = int(_SHIFTS[c])
        high = sizes >> shift
        beyond = np.maximum(high - ESCAPE + 1, 1)
        gamma = np.where(high >= ESCAPE, 5 + np.log2(beyond), 0.0)
        table[c] = shares[c, np.minimum(high, ESCAPE)] + shift + (sizes > 0) + gamma
    return classes, table


class _Model:
    """Counts (classes, symbols) that both sides keep."""

    def __init__(self) -> None:
        self.counts = _starts().copy()

    def see(self, number: int, symbols: np.ndarray) -> None:
        """Take in the symbols of one class."""
        self.counts[number] += _UNIT * np.bincount(symbols, minlength=SYMBOLS)

    def learn(self, classes: np.ndarray, magnitudes: np.ndarray) -> None:
        """Take in entries, both flat."""
        symbols = np.minimum(magnitudes >> _SHIFTS[classes], ESCAPE)
        symbols += classes.astype(np.int64) * SYMBOLS
        found = np.bincount(symbols, minlength=CLASSES * SYMBOLS)
        self.counts += _UNIT * found.reshape(CLASSES, SYMBOLS)

    def table(self, number: int) -> np.ndarray:
        """The counts of a class as what ``constriction`` takes."""
        return self.counts[number].astype(np.float64)


_SHIFTS = np.maximum(0, np.arange(CLASSES) // 3 + LOWEST - 2)
"""Low bits that are stored as they are: expected magnitudes are then below eight symbols."""


@cache
def _starts() -> np.ndarray:
    """(classes, symbols) counts before anything is seen: geometric where most magnitudes are 0 and 1, a
    half-normal distribution above. By decimal arithmetic, which rounds alike on every machine."""
    rows = []
    with localcontext(prec=28):
        for number in range(CLASSES):
            octaves = Decimal(number) / 3 + LOWEST - int(_SHIFTS[number])
            mean = Decimal(2) ** octaves
            if mean < 1:
                weights = [(mean / (1 + mean)) ** k for k in range(SYMBOLS)]
            else:  # a half-normal's mean is σ √(2/π)
                spread = mean * Decimal("1.2533141373155")
                weights = [(-((k / spread) ** 2) / 2).exp() for k in range(SYMBOLS)]
            total = sum(weights)
            rows.append([1 + int(_START * _UNIT * w / total) for w in weights])
    return np.array(rows, dtype=np.int64)


def _blocks(columns: int) -> Iterator[slice]:
    begin = 0
    for k in range(_BLOCKS, -1, -1):
        end = max(columns >> k, min(begin + 1, columns)) if k else columns
        if end > begin:
            yield slice(begin, end)
            begin = end


def _grouped(classes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Order of flat entries by class, the classes that occur, and where each ends in that order."""
    order = np.argsort(classes, kind="stable")
    counts = np.bincount(classes, minlength=CLASSES)
    present = np.flatnonzero(counts)
    return order, present, np.cumsum(counts[present])


def _encode_symbols(integers: np.ndarray, levels: Levels) -> bytes:
    stream, model = constriction_stream(), _Model()
    coder = stream.stack.AnsCoder()
    planned: list[tuple[np.ndarray, np.ndarray]] = []
    signs, lows = [], []
    for part in _blocks(integers.shape[1]):
        classes = levels.classes(part).ravel()
        here = integers[:, part].ravel()
        order, present, ends = _grouped(classes)
        begin = 0
        for number, end in zip(present.tolist(), ends.tolist(), strict=True):
            picked = here[order[begin:end]]
            size, shift = np.abs(picked), int(_SHIFTS[number])
            planned.append((size >> shift, model.table(number)))
            signs.append(picked[size > 0] < 0)
            if shift:
                low = size & ((1 << shift) - 1)
                lows.append((low[:, None] >> np.arange(shift) & 1).astype(bool).ravel())
            begin = end
        model.learn(classes, np.abs(here))
    family = stream.model.Categorical
    for high, table in reversed(planned):
        for excess in (high[high >= ESCAPE] - ESCAPE)[::-1]:
            push_gamma(stream, coder, int(excess) + 1)
        symbols = np.minimum(high, ESCAPE).astype(np.int32)
        coder.encode_reverse(symbols, family(table, perfect=False, lazy=False))
    words = np.asarray(coder.get_compressed(), dtype="<u4").tobytes()
    sign, low = (packed(bits) for bits in (signs, lows))
    return struct.pack("<III", len(words), len(sign), len(low)) + words + sign + low


def _decode_symbols(reader: Reader, levels: Levels) -> np.ndarray:
    stream, model = constriction_stream(), _Model()
    sizes = [reader.number("<I") for _ in range(3)]
    words, sign, low = (np.frombuffer(reader.take(size), dtype=np.uint8) for size in sizes)
    if len(words) % 4 or (len(words) and not words[-4:].any()):
        raise ValueError("damaged matrix: the entropy-coded part is cut")
    coder = stream.stack.AnsCoder(words.view("<u4").astype(np.uint32))
    bits = Bits(sign), Bits(low)
    m, n = len(levels.rows), len(levels.columns)
    out = np.empty((m, n), dtype=np.int32)
    for part in _blocks(n):
        classes = levels.classes(part).ravel()
        order, present, ends = _grouped(classes)
        found = np.empty(len(classes), dtype=np.int32)
        begin = 0
        for number, end in zip(present.tolist(), ends.tolist(), strict=True):
            found[begin:end] = _pop(stream, coder, model, number, end - begin, bits)
            begin = end
        here = np.empty_like(found)
        here[order] = found
        out[:, part] = here.reshape(m, -1)
    if not coder.is_empty() or any(b.left() >= 8 for b in bits):
        raise ValueError("damaged matrix: the entropy-coded part has more than its integers")
    return out


def _pop(
    stream: Any,
    coder: Any,
    model: _Model,
    number: int,
    count: int,
    bits: tuple[Bits, Bits],
) -> np.ndarray:
    """The next ``count`` integers of one class, which the model takes in: a class occurs once a block, so
    that its counts are not asked for again before the next."""
    shift = int(_SHIFTS[number])
    family = stream.model.Categorical(model.table(number), perfect=False, lazy=False)
    sizes: np.ndarray = coder.decode(family, count)
    model.see(number, sizes)
    if np.maximum.reduce(sizes) == ESCAPE:
        for i in np.flatnonzero(sizes == ESCAPE):
            sizes[i] += pop_gamma(stream, coder) - 1
    if shift:
        low = bits[1].take(count * shift).reshape(count, shift)
        if sizes.max(initial=0) >= LARGEST >> shift:
            raise ValueError("damaged matrix: an integer is out of range")
        sizes <<= shift
        for place in range(shift):
            sizes |= low[:, place].astype(np.int32) << place
    there = np.flatnonzero(sizes)
    negative = there[bits[0].take(len(there)).view(bool)]
    sizes[negative] = -sizes[negative]
    return sizes

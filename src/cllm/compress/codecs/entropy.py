"""Integers to bytes: ANS with adaptive models that learn column by column, with no float in their making.

Asymmetric numeral systems (Duda 2013), by the package ``constriction``. An entry's model is chosen by
its expected magnitude: the column's mean (stored, one byte) times what the row's earlier entries were
beside their own columns' means. All models are integer counts that encoder and decoder update alike
after each column, so that a file decodes to the same integers on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from cllm.compress.codecs.frame import Reader
from cllm.core.errors import require

# Magnitudes 0..14 have a symbol each, the last one says that more follows.
SYMBOLS = 16
ESCAPE = SYMBOLS - 1
LARGEST = 2**30  # magnitude of an integer that can be coded

# Expected magnitudes are 16-bit fixed point. Thirds and eighths of an octave, as integers, so that no
# machine's ``pow`` decides.
ONE = 1 << 16
_THIRDS = (65536, 82570, 104032)
_EIGHTHS = (65536, 71468, 77936, 84990, 92682, 101070, 110218, 120194)
_LOWEST = -6  # octaves: smaller expectations share the first model
_CLASSES = 3 * 36
_EDGES = np.array(
    [_THIRDS[i % 3] << (i // 3) >> -_LOWEST for i in range(_CLASSES - 1)], dtype=np.int64
)
# Columns' means from 2^-10 on, code 0 for a column of zeros.
_MEAN_OCTAVE = 10
_MEANS = np.array(
    [0] + [_EIGHTHS[i % 8] << (i // 8) >> _MEAN_OCTAVE for i in range(8 * 31 + 7)], dtype=np.int64
)

_START = 24  # observations that the start of a model counts for
_UNIT = 32  # counts that an observation adds
_FULL = 1 << 17  # counts at which a model begins to forget
_PRIOR = 3  # columns' worth of evidence that a row is like any other


def encode_integers(integers: np.ndarray) -> bytes:
    """``integers`` (V, k) of magnitude below 2^30 as bytes; ``decode_integers`` needs V and k.

    Raises ``UserError`` if ``constriction`` is not installed.
    """
    stream = constriction_stream()
    q = np.asarray(integers, dtype=np.int64)
    assert q.ndim == 2
    assert not q.size or np.abs(q).max() < LARGEST
    codes = _mean_codes(q)
    coder = stream.stack.AnsCoder()
    model = _Model(len(q), codes)
    planned = []
    for j in np.flatnonzero(codes).tolist():
        classes = model.classes(j)
        planned.append((q[:, j], classes, model.counts[classes].astype(np.float64)))
        model.learn(j, classes, np.abs(q[:, j]))
    for column, classes, tables in reversed(planned):
        _push_column(stream, coder, column, classes, tables)
    words = np.asarray(coder.get_compressed(), dtype="<u4").tobytes()
    return codes.tobytes() + len(words).to_bytes(4, "little") + words


def decode_integers(reader: Reader, rows: int, columns: int) -> np.ndarray:
    """The (rows, columns) int64 integers that ``encode_integers`` wrote.

    Raises ``ValueError`` for bytes that are no such thing.
    """
    stream = constriction_stream()
    codes = np.frombuffer(reader.take(columns), dtype=np.uint8)
    words = np.frombuffer(reader.take(reader.number("<I")), dtype=np.uint8)
    if len(words) % 4 or (len(words) and not words[-4:].any()):
        raise ValueError("damaged table: the entropy-coded part is cut")
    coder = stream.stack.AnsCoder(words.view("<u4").astype(np.uint32))
    q = np.zeros((rows, columns), dtype=np.int64)
    model = _Model(rows, codes)
    for j in np.flatnonzero(codes).tolist():
        classes = model.classes(j)
        tables = model.counts[classes].astype(np.float64)
        q[:, j] = _pop_column(stream, coder, classes, tables)
        model.learn(j, classes, np.abs(q[:, j]))
    if not coder.is_empty():
        raise ValueError("damaged table: the entropy-coded part has more than its integers")
    return q


@dataclass(frozen=True)
class Costs:
    """What integers near those that were given would cost: ``classes`` (V, k) and ``table`` in bits."""

    classes: np.ndarray
    table: np.ndarray

    def bits(self, classes: np.ndarray, magnitudes: np.ndarray) -> np.ndarray:
        """Bits of integers of these magnitudes, their signs included; an escape's own are left out."""
        shifts = _shift(classes)
        symbols = np.minimum(magnitudes >> shifts, ESCAPE)
        return self.table[classes, symbols] + shifts + (magnitudes > 0)


def costs_like(integers: np.ndarray) -> Costs:
    """The costs that the coder's models have come to at the end of ``integers`` (V, k)."""
    q = np.asarray(integers, dtype=np.int64)
    codes = _mean_codes(q)
    model = _Model(len(q), codes)
    classes = np.zeros(q.shape, dtype=np.int64)
    for j in np.flatnonzero(codes).tolist():
        classes[:, j] = model.classes(j)
        model.learn(j, classes[:, j], np.abs(q[:, j]))
    shares = model.counts / model.counts.sum(axis=1, keepdims=True)
    return Costs(classes=classes, table=-np.log2(shares))


class _Model:
    """What is expected of the next column, from the columns before it."""

    def __init__(self, rows: int, codes: np.ndarray) -> None:
        self.means = _MEANS[codes]
        self.seen = np.zeros(rows, dtype=np.int64)
        self.expected = 0
        self.counts = _starts().copy()

    def classes(self, j: int) -> np.ndarray:
        """(V,) model of each entry of column ``j``."""
        prior = _PRIOR * ONE
        expected = self.means[j] * (prior + self.seen) // (prior + self.expected)
        return np.searchsorted(_EDGES, expected, side="right")

    def learn(self, j: int, classes: np.ndarray, magnitudes: np.ndarray) -> None:
        """Take in column ``j``: the models' counts, and how large each row is."""
        symbols = np.minimum(magnitudes >> _shift(classes), ESCAPE)
        found = np.bincount(classes * SYMBOLS + symbols, minlength=_CLASSES * SYMBOLS)
        self.counts += _UNIT * found.reshape(_CLASSES, SYMBOLS)
        while (heavy := self.counts.sum(axis=1) > _FULL).any():
            self.counts[heavy] = (self.counts[heavy] + 1) // 2
        # A sum of sparse columns says more than their mean ratio, a ratio of dense ones more than a sum.
        mean = int(self.means[j])
        weight = ONE * ONE // (ONE + mean)
        self.seen += np.minimum(magnitudes, 1 << 20) * weight
        self.expected += mean * weight // ONE


@cache
def _starts() -> np.ndarray:
    """(classes, symbols) counts before anything is seen, worked out once."""
    return np.stack([_start(c) for c in range(_CLASSES)])


def _start(number: int) -> np.ndarray:
    """A geometric distribution of the class's expected magnitude, after the shift, in whole counts."""
    mean = max(int(_EDGES[min(number, _CLASSES - 2)]), 1) >> int(_shift(np.array([number]))[0])
    weights = [1 << 24]
    for _ in range(SYMBOLS - 2):
        weights.append(weights[-1] * mean // (mean + ONE))
    # All magnitudes beyond share the last symbol.
    weights.append(weights[-1] * mean // ONE)
    total = sum(weights)
    return np.array([1 + _START * _UNIT * w // total for w in weights], dtype=np.int64)


def _shift(classes: np.ndarray) -> np.ndarray:
    """Low bits that are coded as they are: magnitudes then spread over some six symbols at most."""
    return np.maximum(0, classes // 3 + _LOWEST - 2)


def _mean_codes(q: np.ndarray) -> np.ndarray:
    """(k,) uint8: each column's mean magnitude in eighths of an octave, 0 for zeros alone."""
    if not q.size:
        return np.zeros(q.shape[1], dtype=np.uint8)
    means = np.abs(q).mean(axis=0) * ONE
    codes = np.searchsorted(_MEANS[1:], means, side="right")
    return np.where(means > 0, np.clip(codes, 1, len(_MEANS) - 1), 0).astype(np.uint8)


def _push_column(
    stream: Any, coder: Any, column: np.ndarray, classes: np.ndarray, tables: np.ndarray
) -> None:
    magnitudes = np.abs(column)
    shifts = _shift(classes)
    high = magnitudes >> shifts
    symbols = np.minimum(high, ESCAPE)
    # The stack gives back what went in last: all is pushed in the reverse of the order of popping.
    signs = (column < 0)[magnitudes > 0]
    if len(signs):
        coder.encode_reverse(signs.astype(np.int32), stream.model.Uniform(2))
    for shift, here in reversed(list(_groups(shifts))):
        low = magnitudes[here] & ((1 << shift) - 1)
        for start, width in reversed(_pieces(shift)):
            part = (low >> start) & ((1 << width) - 1)
            coder.encode_reverse(part.astype(np.int32), stream.model.Uniform(1 << width))
    for excess in (high[symbols == ESCAPE] - ESCAPE)[::-1]:
        value = int(excess) + 1
        bits = value.bit_length() - 1
        for start, width in reversed(_pieces(bits)):
            coder.encode_reverse(
                (value >> start) & ((1 << width) - 1), stream.model.Uniform(1 << width)
            )
        coder.encode_reverse(bits, stream.model.Uniform(32))
    family = stream.model.Categorical(perfect=False)
    coder.encode_reverse(symbols.astype(np.int32), family, tables)


def _pop_column(stream: Any, coder: Any, classes: np.ndarray, tables: np.ndarray) -> np.ndarray:
    family = stream.model.Categorical(perfect=False)
    symbols = coder.decode(family, tables).astype(np.int64)
    shifts = _shift(classes)
    high = symbols.copy()
    for i in np.flatnonzero(symbols == ESCAPE):
        bits = int(coder.decode(stream.model.Uniform(32)))
        value = 1 << bits
        for start, width in _pieces(bits):
            value |= int(coder.decode(stream.model.Uniform(1 << width))) << start
        high[i] += value - 1
    if (high.astype(np.float64) * 2.0**shifts >= LARGEST).any():
        raise ValueError("damaged table: an integer is out of range")
    magnitudes = high << shifts
    for shift, here in _groups(shifts):
        for start, width in _pieces(shift):
            part = coder.decode(stream.model.Uniform(1 << width), int(here.sum()))
            magnitudes[here] |= part.astype(np.int64) << start
    there = magnitudes > 0
    if there.any():
        negative = coder.decode(stream.model.Uniform(2), int(there.sum())).astype(bool)
        magnitudes[there] = np.where(negative, -magnitudes[there], magnitudes[there])
    return magnitudes


def _groups(shifts: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each shift above 0 with the mask of its entries."""
    for shift in np.unique(shifts):
        if shift:
            yield int(shift), shifts == shift


def _pieces(bits: int) -> list[tuple[int, int]]:
    """(start, width) of pieces of at most 16 bits, which one uniform model codes."""
    return [(start, min(16, bits - start)) for start in range(0, bits, 16)]


def constriction_stream() -> Any:
    """``constriction.stream``; ``UserError`` with the line that installs it."""
    return require("constriction", "compress", "coding integers").stream
